"""Datasets of image files, in one folder or several: decoded into memory, or streamed when they do not fit."""

import logging
import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.data.datamodule import DataModule, Split, spaced
from hjepa.data.image_files import CorruptFiles, ImageFiles, Listing, class_folders, list_images

log = logging.getLogger(__name__)


class FolderDataModule(DataModule):
    """Image files in one or several folders: decoded into memory when they fit, else streamed through workers.

    Args:
        roots: the folders; weights: the share of each in an epoch, None leaves every image in once.
        classes: names of the class folders to use, None uses all.
        max_corrupt: share of unreadable images that is tolerated (they are named, and others take their places).
        memory_limit_gb: the most memory that the decoded images of a split may take; above it they are streamed.
        workers: processes that decode streamed images; 0 decodes in the training process, None is one per CPU thread, at most 8.
    """

    tests: tuple[str, ...] = ("test", "val")  # names of the test split; the first that is there
    option = "root"  # what names the folders

    def __init__(
        self,
        roots: list[str],
        weights: list[float] | None,
        classes: list[str] | None,
        max_corrupt: float,
        memory_limit_gb: float,
        workers: int | None,
        **common: object,
    ) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        if not 0 <= max_corrupt <= 1:
            raise UserError(f"dataset.max_corrupt={max_corrupt}: expected a share between 0 and 1.")
        if memory_limit_gb < 0:
            raise UserError(f"dataset.memory_limit_gb={memory_limit_gb}: expected at least 0, which streams everything.")
        if workers is not None and workers < 0:
            raise UserError(f"dataset.workers={workers}: expected at least 0, or null for one per CPU thread of the run.")
        self.roots, self.weights, self.classes = [Path(root).expanduser() for root in roots], weights, classes
        self.max_corrupt, self.memory_limit_gb, self.workers = max_corrupt, memory_limit_gb, workers

    def load(self, split: Literal["train", "test"]) -> Split:
        files = self.join([self.listing(root, split) for root in self.roots])
        if split == "test":
            for root in self.roots:
                self.check_same_classes(root)
        return self.split(files, self.streams(len(files)))

    def check_same_classes(self, root: Path) -> None:
        """Refuse a test split whose class folders are not those to train on: a class is its folder's place among them."""
        train, test = (set(class_folders(self.folder(root, split), None)) for split in ("train", "test"))
        if self.classes is None and train and test and (odd := sorted(train ^ test)):
            raise UserError(
                f"dataset.{self.option}: {root} has the class {odd[0]} in its {'train' if odd[0] in train else 'test'} split "
                f"only ({len(odd)} such classes); the two need the same class folders."
            )

    def train_and_validation(self) -> tuple[Split, Split]:
        listings = [self.listing(root, "train") for root in self.roots]
        files = self.join(listings)
        unlabeled = files.labels.max() < 0
        keep, held = self.parts(torch.zeros(len(files)) if unlabeled else files.labels)
        if self.weights:
            keep = weigh(keep, [len(paths) for paths, _ in listings], self.weights)
        streamed = self.streams(len(keep) + len(held))
        return self.split(files.part(keep), streamed), self.split(files.part(held), streamed)

    def class_names(self, label: str) -> list[str]:
        return [name for root in self.roots for name in class_folders(self.folder(root, "train"), self.classes)]

    def sample(self, count: int) -> Tensor:
        files = self.join([self.listing(root, "train") for root in self.roots])
        return files.part(spaced(len(files), count))[:]  # only these are decoded

    def listing(self, root: Path, split: Literal["train", "test"]) -> Listing:
        """Paths and class indices of a split of one root."""
        if not root.is_dir():
            raise UserError(f"dataset.{self.option}: {root} is not a folder; give the folder that holds train/<class>/*.jpg.")
        return list_images(self.folder(root, split), self.classes)

    def folder(self, root: Path, split: Literal["train", "test"]) -> Path:
        """The folder of a split of one root."""
        names = ("train",) if split == "train" else self.tests
        there = [root / name for name in names if (root / name).is_dir()]
        if not there and (split == "test" or any((root / name).is_dir() for name in self.tests)):
            instead = "; add it, or score on the held-out part of the others: task.split=validation" if split == "test" else ""
            raise UserError(
                f"dataset.{self.option}: {root} has no {' or '.join(f'{name}/' for name in names)} folder of classes{instead}."
            )
        return there[0] if there else root

    def join(self, listings: list[Listing]) -> ImageFiles:
        """The files of all roots; classes of different roots are different labels."""
        first, labels = 0, []
        for _, classes in listings:
            label = torch.tensor(classes)
            labels.append(torch.where(label < 0, label, label + first))
            first += max(classes) + 1
        paths = np.array([os.fsencode(path) for found, _ in listings for path in found])
        return ImageFiles(paths, torch.cat(labels), self.image_size, CorruptFiles(len(paths), self.max_corrupt), self.workers)

    def streams(self, count: int) -> bool:
        """Whether so many images are too many for the memory; says so."""
        size = count * 3 * self.image_size**2 / 2**30
        if size > self.memory_limit_gb:
            log.info(
                "%d images would take %.3g GB, more than dataset.memory_limit_gb=%g: workers decode them during training",
                *(count, size, self.memory_limit_gb),
            )
        return size > self.memory_limit_gb

    def split(self, files: ImageFiles, streamed: bool) -> Split:
        """The files as a split; a streamed one is decoded where it is indexed."""
        return Split(files if streamed else files[:], {"class": files.labels} if files.labels.max() >= 0 else {})


def weigh(positions: Tensor, sizes: list[int], weights: list[float]) -> Tensor:
    """Positions in lists of these sizes, one after the other, repeated until every list has its share; none is left out."""
    lists = torch.bucketize(positions, torch.tensor(sizes).cumsum(0), right=True)
    members = [positions[lists == i] for i in range(len(sizes))]
    whole = max(len(m) / weight for m, weight in zip(members, weights, strict=True))
    counts = [max(len(m), round(weight * whole)) for m, weight in zip(members, weights, strict=True)]
    return torch.cat([m[torch.arange(count) % len(m)] for m, count in zip(members, counts, strict=True)])


class ImageFolder(FolderDataModule):
    """JPEG, PNG or other images in `root/train/<class>/` and `root/test/<class>/` (or `root/val/`), or in `root/<class>/` without
    a test split; images outside class folders have no labels.

    Args:
        root: the folder.
        classes: names of the class folders to use, or a text file with one a line; None uses all.
    """

    def __init__(self, root: str, classes: list[str] | str | None, **common: object) -> None:
        names = read_names(Path(classes).expanduser()) if isinstance(classes, str) else classes
        super().__init__([root], None, names, **common)  # type: ignore[arg-type]


def read_names(file: Path) -> list[str]:
    """The names in a text file, the first word of every line."""
    if not file.is_file():
        raise UserError(f"dataset.classes={file} is no file; give a text file of class folders, a list of them, or null for all.")
    return [line.split()[0] for line in file.read_text().splitlines() if line.strip()]


class ImageNet(ImageFolder):
    """ImageNet or a subset of its classes, in `root/train/<wnid>/` and `root/val/<wnid>/`.

    Args:
        class_count: how many classes there must be, lest a part of them is taken for all.
    """

    tests = ("val",)  # the official test/ has no labels

    def __init__(self, class_count: int, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.class_count = class_count

    def listing(self, root: Path, split: Literal["train", "test"]) -> Listing:
        paths, labels = super().listing(root, split)
        if (there := len(set(labels))) != self.class_count:
            raise UserError(
                f"dataset.root: {root} holds {split} images of {there} classes, expected {self.class_count}; add the others, "
                "name the folders to use in dataset.classes, or use dataset=image_folder for another number of classes."
            )
        return paths, labels


class FolderMixture(FolderDataModule):
    """Several folders as one dataset, each laid out as for `ImageFolder`; equal class names in two folders are two classes.

    Args:
        roots: the folders.
        weights: share of each folder in an epoch, made up by repeating images; None takes every image once.
    """

    option = "roots"

    def __init__(self, roots: list[str], weights: list[float] | None, **common: object) -> None:
        if not roots:
            raise UserError("dataset.roots=[] is empty; give at least one folder.")
        if weights is not None and (len(weights) != len(roots) or min(weights) <= 0):
            raise UserError(f"dataset.weights={list(weights)}: expected {len(roots)} positive numbers, one per root, or null.")
        super().__init__(roots, weights, None, **common)  # type: ignore[arg-type]
