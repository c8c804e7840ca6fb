"""Data modules: labeled images, with a fixed stratified validation split, and their augmentation.

A split is a uint8 tensor in memory, or a list of files that are decoded during training (`hjepa.data.stream`). The model trains
on the training part only; probes are fitted on it and scored on the validation part; the test split is for `task=evaluate`
alone. On the device, images become normalized, augmented crops.

To add a dataset, write a subclass of `DataModule` with `load(split)`, as in `shapes.py`, `image_folder.py` or
`torchvision_datasets.py`, and a file in conf/dataset/ that names it.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import (
    ChannelDeviations,
    ChannelMeans,
    Fraction,
    FractionRange,
    NonNegativeInt,
    OpenFraction,
    PositiveInt,
    SideInt,
)
from hjepa.data.augment import Augment, AugmentParams
from hjepa.data.color import Images
from hjepa.data.image_files import ImageFiles
from hjepa.data.pixels import WHITE
from hjepa.distributed.device import to_device
from hjepa.distributed.seeding import generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Labeled images.

    Attributes:
        images: uint8 [N, 3, S, S], or files that become such a tensor when they are indexed.
        labels: Labels int64 [N] by name, the main one first; -1 stands for an unknown label.
        epoch: Int64 indices of the images of one training epoch, which repeat images if `dataset.weights` asks for it; None for
            every image once.
    """

    images: Tensor | ImageFiles
    labels: dict[str, Tensor]
    epoch: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> "Split":
        return Split(self.images[index], {name: label[index] for name, label in self.labels.items()})

    @property
    def epoch_images(self) -> Tensor | ImageFiles:
        """Images of an epoch of training."""
        if self.epoch is None:
            return self.images
        return self.images[self.epoch] if isinstance(self.images, Tensor) else self.images.select(self.epoch)


class Crops(NamedTuple):
    """Augmented and normalized crops of B images; the crops of an image follow one another.

    Attributes:
        global_crops: V crops of each image, with the size of the images.
        local_crops: L smaller crops of each image, or None.
        boxes: Boxes of the V global and the L local crops of each image, in this order (see `hjepa.models.views`).
    """

    global_crops: Float[Tensor, "bv 3 s s"]
    local_crops: Float[Tensor, "bl 3 l l"] | None
    boxes: Float[Tensor, "b n 2 3"]


class DataModule(ABC):
    """Base class of all datasets.

    Args:
        image_size: Side of the images in pixels; images of other sizes are resized and center-cropped.
        validation: Fraction of the training split that is held out, the same for every label.
        mean: Mean of each channel for normalization, in [0, 1].
        std: Standard deviation of each channel for normalization.
        augment: Augmentation of training images on the device.
        views: Number of global crops of each image.
        local_views: Number of local crops of each image (multi-crop, Caron et al. 2020).
        local_size: Side of local crops in pixels.
        local_scale: Range of a local crop's fraction of the image area.
        early_size: Side of the global crops in the first part of the training (progressive resizing, Howard 2018); None for
            `image_size` throughout.
        early_share: Fraction of the optimizer steps that use `early_size`.
        max_images: Number of images of the training split to use, spread evenly over it, for training and validation together;
            None uses all.

    Attributes:
        background: Color behind the transparent pixels of image files, see `hjepa.data.pixels.to_rgb`.
    """

    background: Sequence[int] | None = WHITE

    def __init__(
        self,
        image_size: SideInt,
        validation: OpenFraction,
        mean: ChannelMeans,
        std: ChannelDeviations,
        augment: Augment,
        views: PositiveInt,
        local_views: NonNegativeInt,
        local_size: PositiveInt,
        local_scale: FractionRange,
        early_size: PositiveInt | None = None,
        early_share: Fraction = 0.5,
        max_images: PositiveInt | None = None,
    ) -> None:
        self.max_images = max_images
        self.early_size, self.early_share = early_size, early_share
        self.views, self.local_views, self.local_size, self.local_scale = views, local_views, local_size, local_scale
        self.image_size, self.validation, self.augment = image_size, validation, augment
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    @abstractmethod
    def load(self, split: Literal["train", "test"]) -> Split:
        """Return all images of a split."""

    def fingerprint(self, split: Literal["train", "test"]) -> str:
        """Return a hash of what the options do not say about a split, such as which files a folder contains, or an empty text."""
        return ""

    def class_names(self, label: str) -> list[str]:
        """Return the names of a label's classes by index, or an empty list if they have no names."""
        return []

    def sample(self, count: int) -> UInt8[Tensor, "n 3 s s"]:
        """Return at most `count` training images, spread evenly over the training split."""
        images = self.load("train").images
        return images[evenly_spaced_indices(len(images), count)]

    def normalize(self, images: UInt8[Tensor, "b 3 h w"]) -> Images:
        """Convert to float32 with zero mean and unit variance over the dataset."""
        return self.standardize(to_unit_range(images))

    def standardize(self, images: Images) -> Images:
        """Shift and scale pixels in [0, 1] to zero mean and unit variance over the dataset, in place."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return images.sub_(self.mean).div_(self.std)

    def sample_params(self, count: int, generator: Generator) -> AugmentParams:
        """Sample the random numbers that decide how `count` images are augmented."""
        global_params, local_params = (
            self.augment.sample_params(count * views, generator).unflatten(1, (count, views))
            for views in (self.views, self.local_views)
        )
        return AugmentParams(global_params, local_params)

    def crop_size(self, progress: float) -> int | None:
        """Return the side of global crops when a fraction of the training is complete; None for the size of the images."""
        return self.early_size if progress < self.early_share else None

    def make_crops(self, images: UInt8[Tensor, "b 3 s s"], params: AugmentParams, size: int | None = None) -> Crops:
        """Return augmented and normalized crops; global crops of another size than the images if `size` is given."""
        pixels = to_unit_range(images)
        global_crops, boxes = self.crop(pixels, params.global_crops, size, None)
        if not self.local_views:
            return Crops(global_crops, None, boxes)
        local_crops, local_boxes = self.crop(pixels, params.local_crops, self.local_size, self.local_scale)
        return Crops(global_crops, local_crops, torch.cat([boxes, local_boxes], dim=1))

    def crop(
        self, pixels: Images, params: Float[Tensor, "num_params b v"], size: int | None, scale: list[float] | None
    ) -> tuple[Float[Tensor, "bv 3 _ _"], Float[Tensor, "b v 2 3"]]:
        """Return V augmented and normalized crops of each image, and their boxes; see `Augment`."""
        views, flat = params.shape[2], params.flatten(1)
        boxes = to_device(self.augment.boxes(flat, size, scale), pixels.device)
        repeated = pixels.repeat_interleave(views, 0) if views > 1 else pixels
        crops = self.augment(repeated, flat, size, scale, boxes)
        return self.standardize(crops.clone() if crops is pixels else crops), boxes.unflatten(0, (-1, views))

    def train_and_validation(self) -> tuple[Split, Split]:
        """Return the training split without the held-out part, and the held-out part; both are the same for every seed."""
        split = self.load("train")
        name, labels = next(iter(split.labels.items()), ("", torch.zeros(len(split))))
        train, held_out = self.split_indices(labels)
        warn_of_unscored_classes(labels[train], labels[held_out], self.class_names(name), self.validation)
        return split[train], split[held_out]

    def split_indices(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sorted indices of the images to train on, and of those held out for validation."""
        used = evenly_spaced_indices(len(labels), self.max_images or len(labels))
        held_out = used[stratified_indices(labels[used], self.validation)]
        if not 0 < len(held_out) < len(used):
            raise UserError(
                f"dataset.validation={self.validation} of {len(used)} images leaves no image to "
                f"{'validate' if len(held_out) == 0 else 'train'} on; use more images or another share."
            )
        is_train = torch.zeros(len(labels), dtype=torch.bool)
        is_train[used] = True
        is_train[held_out] = False
        return is_train.nonzero().squeeze(1), held_out


def warn_of_unscored_classes(train: Tensor, held_out: Tensor, names: list[str], validation: float) -> None:
    """Log a warning if classes have too few images for one in the validation part.

    Args:
        train: Labels of the images to train on; -1 stands for an unknown label.
        held_out: Labels of the validation part.
        names: Names of the classes by label; empty if they have none.
        validation: Fraction of the images that is held out.
    """
    classes, counts = train[train >= 0].long().unique(return_counts=True)
    unscored = (~torch.isin(classes, held_out.long())).nonzero().flatten().tolist()
    if not unscored or os.environ.get("RANK", "0") != "0":
        return
    label, count = int(classes[unscored[0]]), int(counts[unscored[0]])
    log.warning(
        "%d of %d classes have so few images that none is held out for validation, for example %s with %d: the probes score only "
        "the others; add images, or raise dataset.validation=%g.",
        *(len(unscored), len(classes), names[label] if names else label, count, validation),
    )


def evenly_spaced_indices(total: int, count: int) -> Tensor:
    """Return at most `count` indices spread evenly over `total`; images are often sorted by class."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).long()


def to_unit_range(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert uint8 pixels to float32 in [0, 1]."""
    return images.float().div_(255)


def stratified_indices(labels: Tensor, fraction: float) -> Tensor:
    """Return the sorted indices of a fixed random choice of the same fraction of every label; unknown labels are left out."""
    rng = generator(0, "validation")
    counts, chosen = labels[labels >= 0].unique(return_counts=True)[1], []
    for members in labels.argsort(stable=True)[(labels < 0).sum() :].split(counts.tolist()):
        order = torch.randperm(len(members), generator=rng)
        chosen.append(members[order[: round(fraction * len(members))]])
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)
