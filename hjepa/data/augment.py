"""Augmentation on the device, each image of a batch independently.

A random resized crop and a flip are one resampling; the color transforms of `hjepa.data.color` follow. The result for an
image depends only on its column of uniform random numbers. These are sampled for the whole batch at once, so that images come
out the same however the batch is divided among processes and micro-batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from hjepa.config.types import Fraction, FractionRange, PositiveRange
from hjepa.data.color import Blur, Grayscale, Images, Jitter, Params, Solarize
from hjepa.distributed.device import to_device

NUM_CROP_PARAMS = 5  # area, aspect ratio, x, y, flip


class Transform(Protocol):
    """A transform of images by `num_params` numbers per image, uniform in [0, 1)."""

    num_params: int

    def __call__(self, images: Images, params: Params) -> Images: ...


@dataclass(frozen=True)
class AugmentParams:
    """Uniform random numbers for the crops of a batch of B images.

    Attributes:
        global_crops: Numbers for V global crops of each image.
        local_crops: Numbers for L local crops of each image.
    """

    global_crops: Float[Tensor, "num_params b v"]
    local_crops: Float[Tensor, "num_params b l"]

    def select(self, rows: Tensor) -> "AugmentParams":
        """Return the numbers of some images of the batch."""
        return AugmentParams(self.global_crops[:, rows], self.local_crops[:, rows])


class Augment:
    """Random resized crop (Szegedy et al. 2015), horizontal flip, and the color transforms of SimCLR and BYOL.

    Color jitter, grayscale, blur and solarization are applied in this order, each with its own probability per image. A
    transform with a probability of 0 costs nothing.

    Args:
        scale: Range of the crop's fraction of the image area.
        ratio: Range of width / height of the crop.
        flip: Probability of a horizontal flip.
        jitter: Probability of color jitter.
        brightness: Largest deviation of the brightness factor from 1.
        contrast: Largest deviation of the contrast factor from 1.
        saturation: Largest deviation of the saturation factor from 1.
        hue: Largest shift of the hue as a fraction of the color circle, at most 0.5.
        grayscale: Probability of conversion to grayscale.
        blur: Probability of a Gaussian blur.
        blur_sigma: Range of the blur's standard deviation in pixels.
        solarize: Probability of solarization.
        solarize_threshold: Pixels at or above this value are inverted; pixels are in [0, 1].
    """

    def __init__(
        self,
        scale: FractionRange,
        ratio: PositiveRange,
        flip: Fraction,
        jitter: Fraction = 0.0,
        brightness: Fraction = 0.4,
        contrast: Fraction = 0.4,
        saturation: Fraction = 0.2,
        hue: float = 0.1,
        grayscale: Fraction = 0.0,
        blur: Fraction = 0.0,
        blur_sigma: PositiveRange = [0.1, 2.0],  # noqa: B006  # it is never modified
        solarize: Fraction = 0.0,
        solarize_threshold: Fraction = 0.5,
    ) -> None:
        self.scale, self.ratio, self.flip = scale, ratio, flip
        transforms: list[tuple[float, Transform]] = [
            (jitter, Jitter(brightness, contrast, saturation, hue)),
            (grayscale, Grayscale()),
            (blur, Blur(blur_sigma)),
            (solarize, Solarize(solarize_threshold)),
        ]
        self.transforms = [(probability, transform) for probability, transform in transforms if probability > 0]

    def sample_params(self, count: int, generator: Generator) -> Float[Tensor, "num_params count"]:
        """Sample the uniform random numbers for `count` images from a CPU generator.

        The first rows belong to the crop and the flip. Each transform adds a row that decides if it is applied, and its own.
        """
        num_params = NUM_CROP_PARAMS + sum(1 + transform.num_params for _, transform in self.transforms)
        return torch.rand(num_params, count, generator=generator)

    def __call__(
        self,
        images: Images,
        params: Params,
        size: int | None = None,
        scale: Sequence[float] | None = None,
        boxes: Float[Tensor, "b 2 3"] | None = None,
    ) -> Float[Tensor, "b 3 _ _"]:
        """Augment images with pixels in [0, 1].

        Args:
            images: The images.
            params: Random numbers on the CPU, see `sample_params`.
            size: Side of the output in pixels; None keeps the size of the images.
            scale: Range of the crop's fraction of the image area; None uses the range of the constructor.
            boxes: Boxes of the crops on the device of the images, if `boxes` has already computed them.
        """
        images = self.crop_and_flip(images, params[:NUM_CROP_PARAMS], size, scale or self.scale, boxes)
        row = NUM_CROP_PARAMS
        for probability, transform in self.transforms:
            images = apply_randomly(transform, probability, images, params[row : row + 1 + transform.num_params])
            row += 1 + transform.num_params
        return images

    def boxes(self, params: Params, size: int | None = None, scale: Sequence[float] | None = None) -> Float[Tensor, "b 2 3"]:
        """Return where the crops lie: affine maps from a crop to its image, both in coordinates from -1 to 1; see `__call__`."""
        if self.keeps_image(size, scale or self.scale):
            return torch.eye(2, 3).expand(params.shape[1], -1, -1)
        return self.crop_boxes(params[:NUM_CROP_PARAMS], scale or self.scale)

    def keeps_image(self, size: int | None, scale: Sequence[float]) -> bool:
        """Return True if images are neither cropped nor flipped nor resized."""
        return scale[0] == 1 and self.flip == 0 and size is None

    def crop_and_flip(
        self,
        images: Images,
        params: Params,
        size: int | None,
        scale: Sequence[float],
        boxes: Float[Tensor, "b 2 3"] | None = None,
    ) -> Float[Tensor, "b 3 _ _"]:
        """Crop, resize and flip images by bilinear interpolation; borders are repeated."""
        if self.keeps_image(size, scale):
            return images
        if boxes is None:
            boxes = to_device(self.crop_boxes(params, scale), images.device)
        shape = [*images.shape[:2], size or images.shape[2], size or images.shape[3]]
        grid = F.affine_grid(boxes, shape, align_corners=False)
        for axis, side in enumerate((images.shape[3], images.shape[2])):  # padding_mode="border", which Apple's GPUs lack
            grid[..., axis].clamp_(1 / side - 1, 1 - 1 / side)
        return F.grid_sample(images, grid, mode="bilinear", align_corners=False)

    def crop_boxes(self, params: Params, scale: Sequence[float]) -> Float[Tensor, "b 2 3"]:
        """Return the affine maps from the output to the crop, both in coordinates from -1 to 1."""
        area, ratio, x, y, flip = params
        area = scale[0] + (scale[1] - scale[0]) * area
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * ratio)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        if scale[0] == 1:  # the whole image, whose shape is kept
            width = height = torch.ones_like(area)
        sign = torch.where(flip < self.flip, -1.0, 1.0)
        zero = torch.zeros_like(area)
        rows = [
            torch.stack([width * sign, zero, (2 * x - 1) * (1 - width)], dim=1),
            torch.stack([zero, height, (2 * y - 1) * (1 - height)], dim=1),
        ]
        return torch.stack(rows, dim=1)


def apply_randomly(transform: Transform, probability: float, images: Images, params: Params) -> Images:
    """Transform the images whose first number is below the probability; nothing is computed for the others."""
    chosen = (params[0] < probability).nonzero().squeeze(1)
    if len(chosen) == 0:
        return images
    amounts, chosen = to_device(params[1:, chosen], images.device), to_device(chosen, images.device)
    return images.index_copy(0, chosen, transform(images[chosen], amounts).contiguous())
