"""Datasets: labeled images, as uint8 tensors in memory or as files that are streamed, with a fixed stratified validation split.

A dataset is a class with `load(split) -> Split`. Training sees the training part only; the probes fit on it and are scored
on the validation part; the test split is for `task=evaluate` alone. Those there are: `embedded.py`, `folders.py`,
`downloaded.py`. To add one, write one class and one YAML.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from hjepa.config.errors import UserError
from hjepa.data.augment import Augment, AugmentParams
from hjepa.data.image_files import ImageFiles
from hjepa.distributed.seeding import generator


@dataclass(frozen=True)
class Split:
    """`images` uint8 [N, 3, S, S], or files that become such a tensor where they are indexed; `labels` int64 [N] by name, the
    main one first, -1 where unknown.
    """

    images: Tensor | ImageFiles
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> "Split":
        return Split(self.images[index], {name: label[index] for name, label in self.labels.items()})


class DataModule(ABC):
    """What all datasets share.

    Args:
        image_size: side of the images in pixels; others are resized and center-cropped to it.
        validation: share of the training split that is held out, the same for every label.
        mean, std: per channel, in [0, 1], for normalization.
        augment: applied to training images on the device; views: whole views of each image that it draws.
        local_views, local_size, local_scale: number, side in pixels and share of the area of local crops, which are augmented
            alike (multi-crop, Caron et al. 2020).
    """

    def __init__(
        self,
        image_size: int,
        validation: float,
        mean: list[float],
        std: list[float],
        augment: Augment,
        views: int,
        local_views: int,
        local_size: int,
        local_scale: list[float],
    ) -> None:
        if not 0 < validation < 1:
            raise UserError(f"dataset.validation={validation}: expected a share between 0 and 1.")
        if views < 1 or local_views < 0 or local_size < 1:
            raise UserError(
                f"dataset.views={views}, local_views={local_views} and local_size={local_size}: expected at least 1, 0 and 1."
            )
        if len(local_scale) != 2 or not 0 < local_scale[0] <= local_scale[1] <= 1:
            raise UserError(f"dataset.local_scale={list(local_scale)}: expected 0 < smallest <= largest <= 1.")
        self.views, self.local_views, self.local_size, self.local_scale = views, local_views, local_size, local_scale
        self.image_size, self.validation, self.augment = image_size, validation, augment
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    @abstractmethod
    def load(self, split: Literal["train", "test"]) -> Split:
        """All images of a split."""

    def class_names(self, label: str) -> list[str]:
        """What the classes of a label are called, by index; empty where they have no names."""
        return []

    def sample(self, count: int) -> Tensor:
        """At most `count` training images, evenly spread: uint8 [count, 3, S, S]."""
        images = self.load("train").images
        return images[spaced(len(images), count)]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32, zero mean and unit variance over the dataset."""
        return self.standardize(unit(images))

    def standardize(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] -> zero mean and unit variance over the dataset, in place."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return images.sub_(self.mean).div_(self.std)

    def draw(self, count: int, generator: Generator) -> AugmentParams:
        """The random numbers that decide what becomes of `count` images."""
        whole, local = (
            self.augment.draw(count * views, generator).unflatten(1, (count, views)) for views in (self.views, self.local_views)
        )
        return AugmentParams(whole, local)

    def crops(self, images: Tensor, draws: AugmentParams) -> tuple[Tensor, Tensor | None]:
        """Augmented, normalized views of uint8 images [B, 3, S, S], those of one image in a row.

        Returns:
            Whole views float [B * views, 3, S, S] and local crops [B * local_views, 3, local_size, local_size], or None.
        """
        images = unit(images)
        repeated = images.repeat_interleave(self.views, 0) if self.views > 1 else images
        whole = self.augment(repeated, draws.global_crops.flatten(1))
        if not self.local_views:
            return self.standardize(whole), None
        repeated = images.repeat_interleave(self.local_views, 0)
        local = self.augment(repeated, draws.local_crops.flatten(1), self.local_size, self.local_scale)
        return self.standardize(whole), self.standardize(local)

    def train_and_validation(self) -> tuple[Split, Split]:
        """The training split without and the part of it that is held out; the same parts for every seed of a run."""
        everything = self.load("train")
        keep, held = self.parts(next(iter(everything.labels.values()), torch.zeros(len(everything))))
        return everything[keep], everything[held]

    def parts(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted indices of the images to train on and of those held out."""
        held = stratified(labels, self.validation)
        if not 0 < len(held) < len(labels):
            raise UserError(
                f"dataset.validation={self.validation} of {len(labels)} images leaves no image to "
                f"{'validate' if len(held) == 0 else 'train'} on; use more images or another share."
            )
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[held] = False
        return keep.nonzero().squeeze(1), held


def spaced(total: int, count: int) -> Tensor:
    """At most `count` positions spread evenly over `total`: folders are sorted by class."""
    return torch.linspace(0, total - 1, min(count, total)).long()


def unit(images: Tensor) -> Tensor:
    """uint8 -> float32 pixels in [0, 1]."""
    return images.float().div_(255)


def stratified(labels: Tensor, share: float) -> Tensor:
    """Sorted indices of the same `share` of every known label (of everything where there is one label only)."""
    rng = generator(0, "validation")
    chosen = []
    for label in labels[labels >= 0].unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=rng)
        chosen.append(members[order[: round(share * len(members))]])
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)
