"""Datasets of encoded images: decoded into memory if they fit, else streamed through worker processes.

To read images from another place, write a subclass with `find_images(split)`, as in `image_folder.py`, `webdataset.py` or
`huggingface.py`, and a file in conf/dataset/ that names it.
"""

import hashlib
import logging
from abc import abstractmethod
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import Color, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat
from hjepa.data.datamodule import DataModule, Split, evenly_spaced_indices, warn_of_unscored_classes
from hjepa.data.image_files import MAX_MEGAPIXELS, CorruptFiles, ImageFiles
from hjepa.data.pixels import WHITE
from hjepa.data.sources import ImageSource

log = logging.getLogger(__name__)


class FileDataModule(DataModule):
    """Base class of datasets of encoded images.

    Args:
        max_corrupt: Fraction of images that may be unreadable; they are named, and others take their places.
        memory_limit_gb: Largest memory in GB for the decoded images of a split; larger splits are streamed, and 0 streams all.
        workers: Number of processes that decode streamed images; 0 decodes in the training process, and None uses one per CPU
            thread, at most 8.
        background: Color behind transparent pixels, as [red, green, blue] from 0 to 255; None ignores transparency, so that the
            colors under transparent pixels show, as in version 0.1.
        max_megapixels: Size in millions of pixels above which images are not decoded.
        **common: Options of `DataModule`.
    """

    def __init__(
        self,
        max_corrupt: Fraction,
        memory_limit_gb: NonNegativeFloat,
        workers: NonNegativeInt | None,
        background: Color | None = list(WHITE),  # noqa: B006  # it is never modified
        max_megapixels: PositiveFloat = MAX_MEGAPIXELS,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.background, self.max_megapixels = background, max_megapixels
        self.max_corrupt, self.memory_limit_gb, self.workers = max_corrupt, memory_limit_gb, workers

    @abstractmethod
    def find_images(self, split: Literal["train", "test"]) -> tuple[ImageSource, Tensor]:
        """Return the images of a split and their labels int64 [N], -1 for an unknown label."""

    def fingerprint(self, split: Literal["train", "test"]) -> str:
        """Return a hash of the names and labels of the images; it does not change when all of them are moved together."""
        source, labels = self.find_images(split)
        names = [source.name(position) for position in range(len(source))]
        pairs = zip(min(names), max(names), strict=False)
        start = next((place for place, (a, b) in enumerate(pairs) if a != b), 0)  # what all names have in common
        content = hashlib.sha256(labels.numpy().tobytes())
        content.update("\0".join(name[start:] for name in names).encode(errors="surrogateescape"))
        return content.hexdigest()[:8]

    def load(self, split: Literal["train", "test"]) -> Split:
        files = self.files(split)
        return self.make_split(files, self.must_stream(len(files)))

    def train_and_validation(self) -> tuple[Split, Split]:
        files = self.files("train")
        is_unlabeled = files.labels.max() < 0
        train, held_out = self.split_indices(torch.zeros(len(files)) if is_unlabeled else files.labels)
        warn_of_unscored_classes(files.labels[train], files.labels[held_out], self.class_names("class"), self.validation)
        epoch = self.repeat(train)
        stream = self.must_stream(len(train if epoch is None else epoch) + len(held_out))
        training = self.make_split(files.select(train), stream)
        epoch = None if epoch is None else torch.searchsorted(train, epoch)
        return replace(training, epoch=epoch), self.make_split(files.select(held_out), stream)

    def repeat(self, train: Tensor) -> Tensor | None:
        """Return the positions of the images of an epoch, given those of all images to train on; None for each of them once."""
        return None

    def sample(self, count: int) -> Tensor:
        files = self.files("train")
        return files.select(evenly_spaced_indices(len(files), count))[:]  # decodes these only

    def files(self, split: Literal["train", "test"]) -> ImageFiles:
        """Return the images of a split, not decoded yet."""
        source, labels = self.find_images(split)
        corrupt = CorruptFiles(len(source), self.max_corrupt)
        return ImageFiles(source, labels, self.image_size, corrupt, self.workers, self.background, self.max_megapixels)

    def must_stream(self, count: int) -> bool:
        """Return whether the decoded images would exceed the memory limit, and log it if so."""
        size = count * 3 * self.image_size**2 / 2**30
        if size > self.memory_limit_gb:
            log.info(
                "%d images would take %.3g GB, more than dataset.memory_limit_gb=%g: workers decode them during training",
                *(count, size, self.memory_limit_gb),
            )
        return size > self.memory_limit_gb

    def make_split(self, files: ImageFiles, stream: bool) -> Split:
        """Return the files as a split; they are decoded now unless they are streamed."""
        return Split(files if stream else files[:], {"class": files.labels} if files.labels.max() >= 0 else {})


def class_indices(texts: np.ndarray, names: list[str], split: str) -> Tensor:
    """Return the classes int64 [N] of labels that are texts; -1 for empty texts.

    Args:
        texts: The labels, str [N].
        names: Names of the classes of the training split by number.
        split: Option that names the split, for messages.

    Raises:
        UserError: The training split lacks a class.
    """
    numbers = {name: number for number, name in enumerate(names)} | {"": -1}
    unique, inverse = np.unique(texts, return_inverse=True)
    if unknown := [text for text in unique.tolist() if text not in numbers]:
        raise UserError(
            f"{split} has images of the class {unknown[0]} ({len(unknown)} such classes), of which the training split has none; "
            "both splits need the same classes."
        )
    return torch.from_numpy(np.array([numbers[text] for text in unique.tolist()], np.int64)[inverse.reshape(-1)])
