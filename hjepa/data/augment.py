"""Augmentation on the device, every image of the batch on its own: a random resized crop and a flip in one resampling, then
the color changes that are switched on. What happens to an image follows from its column of uniform numbers alone, which are
drawn for the whole batch: however a batch is divided, its images come out the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hjepa.config.errors import UserError
from hjepa.data.color import Blur, Grayscale, Jitter, Solarize

BOX = 5  # numbers that a crop and flip take


class Transform(Protocol):
    """A change of images [B, 3, H, W] by numbers [draws, B], uniform in [0, 1)."""

    draws: int

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class AugmentParams:
    """Uniform numbers for the views of a batch: whole ones [n, B, V] and local crops [n, B, L]."""

    global_crops: Tensor
    local_crops: Tensor

    def select(self, rows: Tensor) -> "AugmentParams":
        """Those of some images of the batch."""
        return AugmentParams(self.global_crops[:, rows], self.local_crops[:, rows])


class Augment:
    """Random resized crop (Szegedy et al. 2015) and horizontal flip, then color jitter, grayscale, blur and solarization, each
    with a probability per image (SimCLR, BYOL); a probability of 0 costs nothing.

    Args:
        scale: [smallest, largest] share of the image's area; ratio: [smallest, largest] width / height of the crop.
        flip: probability of a horizontal flip.
        jitter: probability of a jitter of the colors; brightness, contrast, saturation: largest deviation of the factor from
            1; hue: largest turn, 0.5 is half the color circle.
        grayscale: probability of a gray image.
        blur: probability of a Gaussian blur; blur_sigma: [smallest, largest] standard deviation in pixels.
        solarize: probability of inverting the pixels at or above solarize_threshold, in [0, 1].
    """

    def __init__(
        self,
        scale: list[float],
        ratio: list[float],
        flip: float,
        jitter: float = 0.0,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        grayscale: float = 0.0,
        blur: float = 0.0,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize: float = 0.0,
        solarize_threshold: float = 0.5,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"dataset.augment.scale={list(scale)}: expected 0 < smallest <= largest <= 1.")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"dataset.augment.ratio={list(ratio)}: expected 0 < smallest <= largest.")
        chances = {"flip": flip, "jitter": jitter, "grayscale": grayscale, "blur": blur, "solarize": solarize}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise UserError(f"dataset.augment.{name}={chance}: expected a probability.")
        self.scale, self.ratio, self.flip = scale, ratio, flip
        changes: list[tuple[float, Transform]] = [
            (jitter, Jitter(brightness, contrast, saturation, hue)),
            (grayscale, Grayscale()),
            (blur, Blur(blur_sigma)),
            (solarize, Solarize(solarize_threshold)),
        ]
        self.changes = [(chance, change) for chance, change in changes if chance > 0]

    def draw(self, count: int, generator: Generator) -> Tensor:
        """The uniform numbers [n, count] for as many images, from a CPU generator: for the box, then for every change whether
        it happens and by how much.
        """
        return torch.rand(BOX + sum(1 + change.draws for _, change in self.changes), count, generator=generator)

    def __call__(self, images: Tensor, numbers: Tensor, size: int | None = None, scale: list[float] | None = None) -> Tensor:
        """Images float [B, 3, H, W] in [0, 1] -> augmented ones of the same size, or local crops [B, 3, size, size].

        Args:
            numbers: [n, B] on the CPU, see `draw`; size, scale: of local crops, None for those of whole views.
        """
        images = self.crop(images, numbers[:BOX], size, scale or self.scale)
        row = BOX
        for chance, change in self.changes:
            images = sometimes(chance, change, images, numbers[row : row + 1 + change.draws])
            row += 1 + change.draws
        return images

    def crop(self, images: Tensor, numbers: Tensor, size: int | None, scale: list[float]) -> Tensor:
        """Crops and flips of images [B, 3, H, W]; bilinear, borders repeated."""
        if scale[0] == 1 and self.flip == 0 and size is None:
            return images
        boxes = self.boxes(numbers, scale).to(images.device, non_blocking=True)
        shape = [*images.shape[:2], size or images.shape[2], size or images.shape[3]]
        places = F.affine_grid(boxes, shape, align_corners=False)
        return F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)

    def boxes(self, numbers: Tensor, scale: list[float]) -> Tensor:
        """Affine maps [B, 2, 3] from the output to the crop, both in [-1, 1], from numbers [5, B]."""
        area, ratio, x, y, coin = numbers
        area = scale[0] + (scale[1] - scale[0]) * area
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * ratio)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        sign = torch.where(coin < self.flip, -1.0, 1.0)
        zero = torch.zeros_like(area)
        rows = [
            torch.stack([width * sign, zero, (2 * x - 1) * (1 - width)], dim=1),
            torch.stack([zero, height, (2 * y - 1) * (1 - height)], dim=1),
        ]
        return torch.stack(rows, dim=1)


def sometimes(chance: float, change: Transform, images: Tensor, numbers: Tensor) -> Tensor:
    """The images [B, 3, H, W], each changed if its first number is below the chance; what is not chosen is not computed."""
    chosen = (numbers[0] < chance).nonzero().squeeze(1)
    if len(chosen) == 0:
        return images
    amounts = numbers[1:, chosen].to(images.device, non_blocking=True)
    chosen = chosen.to(images.device, non_blocking=True)
    return images.index_copy(0, chosen, change(images[chosen], amounts).contiguous())
