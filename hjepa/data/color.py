"""Color transforms of a batch of images with pixels in [0, 1], each image by its own amount.

The functions take one amount per image and agree, image by image, with `torchvision.transforms.functional`, which has to be
called once per image. The classes `Jitter`, `Grayscale`, `Blur` and `Solarize` turn uniform random numbers into amounts;
`hjepa.data.augment` applies them.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hjepa.config.errors import UserError

Images = Float[Tensor, "b 3 h w"]
Params = Float[Tensor, "num_params b"]
PerImage = Float[Tensor, " b"]

LUMA = (0.2989, 0.587, 0.114)


class Jitter:
    """Changes brightness, contrast, saturation and hue, in this order, by random amounts.

    Args:
        brightness: Largest deviation of the factor from 1.
        contrast: Largest deviation of the factor from 1.
        saturation: Largest deviation of the factor from 1.
        hue: Largest shift as a fraction of the color circle, at most 0.5.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        if not 0 <= hue <= 0.5:
            raise UserError(f"dataset.augment.hue={hue}: expected 0 to 0.5, which is half the color circle.")
        steps = [
            (adjust_brightness, 1.0, brightness),
            (adjust_contrast, 1.0, contrast),
            (adjust_saturation, 1.0, saturation),
            (adjust_hue, 0.0, hue),
        ]
        self.steps = [(adjust, center, strength) for adjust, center, strength in steps if strength > 0]
        self.num_params = len(self.steps)

    def __call__(self, images: Images, params: Params) -> Images:
        for (adjust, center, strength), param in zip(self.steps, params, strict=True):
            images = adjust(images, center + strength * (2 * param - 1))
        return images


class Grayscale:
    """Replaces the three channels by the luma."""

    num_params = 0

    def __call__(self, images: Images, params: Params) -> Images:
        return luma(images).expand_as(images)


class Blur:
    """Gaussian blur with a random standard deviation.

    Args:
        sigma: Range of the standard deviation in pixels.
    """

    num_params = 1

    def __init__(self, sigma: Sequence[float]) -> None:
        self.sigma, self.radius = sigma, math.ceil(3 * sigma[1])

    def __call__(self, images: Images, params: Params) -> Images:
        low, high = self.sigma
        return blur(images, low + (high - low) * params[0], self.radius)


class Solarize:
    """Inverts the pixels at or above a threshold.

    Args:
        threshold: Threshold in [0, 1].
    """

    num_params = 0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, images: Images, params: Params) -> Images:
        return torch.where(images >= self.threshold, 1 - images, images)


def luma(images: Images) -> Float[Tensor, "b 1 h w"]:
    """Return the perceived brightness of every pixel."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def blend(images: Images, others: Float[Tensor, "b _ _ _"], factors: PerImage) -> Images:
    """Return others + factors * (images - others), clamped to [0, 1]."""
    return torch.lerp(others, images, factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_brightness(images: Images, factors: PerImage) -> Images:
    """Blend with black; a factor of 0 returns black and a factor of 1 the image."""
    return (images * factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Images, factors: PerImage) -> Images:
    """Blend with the mean luma of the image."""
    return blend(images, luma(images).mean((1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Images, factors: PerImage) -> Images:
    """Blend with the grayscale image."""
    return blend(images, luma(images), factors)


def adjust_hue(images: Images, shifts: PerImage) -> Images:
    """Shift the hue by a fraction of the color circle.

    Value and chroma of HSV are kept, so that no conversion through saturation is needed.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = chroma.clamp(min=1e-8)  # gray has no hue, so that any value will do
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sextant += 6 * shifts.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        position = (sextant + offset).remainder_(6)
        channels.append(value - chroma * torch.minimum(position, 4 - position).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def blur(images: Images, sigmas: PerImage, radius: int) -> Images:
    """Blur with Gaussian kernels that are cut off at `radius` pixels; borders are reflected.

    Args:
        images: The images.
        sigmas: Standard deviation for each image in pixels.
        radius: Half the width of the kernels in pixels.
    """
    batch, channels, height, width = images.shape
    radius = min(radius, height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.softmax(-0.5 * (offsets / sigmas.unsqueeze(1)).square(), dim=1).repeat_interleave(channels, dim=0)
    planes = F.pad(images, [radius] * 4, mode="reflect").reshape(1, batch * channels, height + 2 * radius, width + 2 * radius)
    for shape in ((-1, 1, 1, 2 * radius + 1), (-1, 1, 2 * radius + 1, 1)):
        planes = F.conv2d(planes, kernels.view(shape), groups=batch * channels)
    return planes.view_as(images)
