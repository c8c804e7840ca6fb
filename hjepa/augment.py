"""Augmentation on the device: a random resized crop and a flip of its own per image, in one resampling of the batch."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hjepa.errors import UserError


class Augment:
    """Random resized crop (Szegedy et al. 2015) and horizontal flip.

    Args:
        scale: [smallest, largest] share of the image's area; ratio: [smallest, largest] width / height of the crop.
        flip: probability of a horizontal flip.
    """

    def __init__(self, scale: list[float], ratio: list[float], flip: float) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"dataset.augment.scale={list(scale)}: expected 0 < smallest <= largest <= 1.")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"dataset.augment.ratio={list(ratio)}: expected 0 < smallest <= largest.")
        if not 0 <= flip <= 1:
            raise UserError(f"dataset.augment.flip={flip}: expected a probability.")
        self.scale, self.ratio, self.flip = scale, ratio, flip

    def boxes(self, count: int, generator: Generator) -> Tensor:
        """Affine maps [count, 2, 3] from the output to the crop, both in [-1, 1]; drawn on the CPU."""
        area, ratio, x, y, coin = torch.rand(5, count, generator=generator)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * area
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * ratio)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        sign = torch.where(coin < self.flip, -1.0, 1.0)
        zero = torch.zeros(count)
        rows = [
            torch.stack([width * sign, zero, (2 * x - 1) * (1 - width)], dim=1),
            torch.stack([zero, height, (2 * y - 1) * (1 - height)], dim=1),
        ]
        return torch.stack(rows, dim=1)

    def __call__(self, images: Tensor, generator: Generator, size: int | None = None) -> Tensor:
        """Normalised images [B, 3, H, W] -> crops of the same size or [B, 3, size, size]; bilinear, borders repeated."""
        if self.scale[0] == 1 and self.flip == 0 and size is None:
            return images
        boxes = self.boxes(len(images), generator).to(images.device, non_blocking=True)
        shape = [len(images), images.shape[1], size or images.shape[2], size or images.shape[3]]
        places = F.affine_grid(boxes, shape, align_corners=False)
        return F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)
