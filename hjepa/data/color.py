"""Color changes of a batch, each image by an amount of its own: images float [B, 3, H, W] with pixels in [0, 1].

The functions take the amounts [B] and agree, image by image, with `torchvision.transforms.functional`, which has to be called
once per image. `Jitter`, `Grayscale`, `Blur` and `Solarize` derive them from numbers uniform in [0, 1), `draws` per image.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError

LUMA = (0.2989, 0.587, 0.114)


class Jitter:
    """Brightness, contrast, saturation and hue, in this order, each by a random amount.

    Args:
        brightness, contrast, saturation: largest deviation of the factor from 1; hue: largest turn, 0.5 is half the circle.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        for name, strength in strengths.items():
            if not 0 <= strength <= (most := 0.5 if name == "hue" else 1):
                raise UserError(f"dataset.augment.{name}={strength}: expected 0 to {most}.")
        steps = [
            (adjust_brightness, 1.0, brightness),
            (adjust_contrast, 1.0, contrast),
            (adjust_saturation, 1.0, saturation),
            (adjust_hue, 0.0, hue),
        ]
        self.steps = [(change, center, strength) for change, center, strength in steps if strength > 0]
        self.draws = len(self.steps)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images [B, 3, H, W] and numbers [draws, B] -> jittered ones."""
        for (change, center, strength), number in zip(self.steps, numbers, strict=True):
            images = change(images, center + strength * (2 * number - 1))
        return images


class Grayscale:
    """Gray images with three equal channels."""

    draws = 0

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> gray ones."""
        return luma(images).expand_as(images)


class Blur:
    """Gaussian blur.

    Args:
        sigma: [smallest, largest] standard deviation in pixels.
    """

    draws = 1

    def __init__(self, sigma: Sequence[float]) -> None:
        if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1]:
            raise UserError(f"dataset.augment.blur_sigma={list(sigma)}: expected 0 < smallest <= largest, in pixels.")
        self.sigma, self.radius = sigma, math.ceil(3 * sigma[1])

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images [B, 3, H, W] and numbers [1, B] -> blurred ones."""
        low, high = self.sigma
        return blur(images, low + (high - low) * numbers[0], self.radius)


class Solarize:
    """Pixels at or above a threshold are inverted.

    Args:
        threshold: in [0, 1].
    """

    draws = 0

    def __init__(self, threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"dataset.augment.solarize_threshold={threshold}: expected 0 to 1.")
        self.threshold = threshold

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> solarized ones."""
        return torch.where(images >= self.threshold, 1 - images, images)


def luma(images: Tensor) -> Tensor:
    """Brightness as the eye sees it, [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """others + factors * (images - others), kept in [0, 1]; factors [B]."""
    return torch.lerp(others, images, factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black: factor 0 is black, 1 the image."""
    return (images * factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image's mean brightness."""
    return blend(images, luma(images).mean((1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the gray image."""
    return blend(images, luma(images), factors)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue by a share [B] of the color circle; value and chroma stay (HSV without its detour through saturation)."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = chroma.clamp(min=1e-8)  # gray has no hue, any will do
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sextant += 6 * turns.view(-1, 1, 1)
    turned = []
    for offset in (5, 3, 1):
        place = (sextant + offset).remainder_(6)
        turned.append(value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(turned, dim=1)


def blur(images: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """Gaussian blur with standard deviations [B] in pixels, cut off at `radius` pixels, borders reflected."""
    batch, channels, height, width = images.shape
    radius = min(radius, height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.softmax(-0.5 * (offsets / sigmas.unsqueeze(1)).square(), dim=1).repeat_interleave(channels, dim=0)
    lines = F.pad(images, [radius] * 4, mode="reflect").reshape(1, batch * channels, height + 2 * radius, width + 2 * radius)
    for shape in ((-1, 1, 1, 2 * radius + 1), (-1, 1, 2 * radius + 1, 1)):
        lines = F.conv2d(lines, kernels.view(shape), groups=batch * channels)
    return lines.view_as(images)
