"""Datasets of image files in one or several folders."""

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import PositiveFloat, PositiveInt
from hjepa.data.file_datamodule import FileDataModule
from hjepa.data.file_lists import FileList, Folder, class_folders, list_images
from hjepa.data.sources import FilePaths

log = logging.getLogger(__name__)

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


class FolderDataModule(FileDataModule):
    """Base class of datasets in one or several folders of image files.

    Args:
        roots: The folders.
        weights: Share of each folder in an epoch; None uses every image once.
        classes: Names of the class folders to use, or a text file with one name per line; None uses all.
        **files: Options of `FileDataModule`.
    """

    test_folders: tuple[str, ...] = ("test", "val")  # names of the test split; the first that exists is used
    root_option = "root"  # option that names the folders, for messages

    def __init__(self, roots: list[str], weights: list[float] | None, classes: list[str] | str | None, **files: Any) -> None:
        super().__init__(**files)
        self.roots, self.weights, self.chosen = [Path(root).expanduser() for root in roots], weights, classes

    @cached_property
    def classes(self) -> list[str] | None:
        """Names of the class folders to use; a file is only read when images are, so that an encoder can be loaded without."""
        return read_lines(Path(self.chosen).expanduser()) if isinstance(self.chosen, str) else self.chosen

    def find_images(self, split: Literal["train", "test"]) -> tuple[FilePaths, Tensor]:
        """Return the files of all roots; classes of different roots are different labels."""
        if split == "train":
            for root in self.roots:
                self.check_layout(root)
        file_lists = [self.list_files(root, split) for root in self.roots]
        if split == "test":
            for root in self.roots:
                self.check_same_classes(root)
        first_label, labels = 0, []
        for root, (_, classes) in zip(self.roots, file_lists, strict=True):
            label = torch.tensor(classes)
            labels.append(torch.where(label < 0, label, label + first_label))
            first_label += len(class_folders(self.split_folder(root, split), self.classes))
        return FilePaths(np.array([os.fsencode(path) for paths, _ in file_lists for path in paths])), torch.cat(labels)

    def check_layout(self, root: Path) -> None:
        """Raise an error if the class folders look like splits; warn of images beside class folders, which are left out."""
        if not root.is_dir():
            return  # `list_files` says so
        folder = Folder(self.split_folder(root, "train"))
        names = folder.folders
        if self.classes is None and names and {name.lower() for name in names} <= SPLIT_NAMES:
            raise UserError(
                f"dataset.{self.root_option}: the folders {', '.join(names)} in {folder.path} look like splits, not like "
                "classes; rename them to train and test (or val), or list them in dataset.classes if they are classes."
            )
        if names and folder.images:
            log.warning("%d images directly in %s, beside the class folders, are left out.", len(folder.images), folder.path)

    def check_same_classes(self, root: Path) -> None:
        """Raise an error if the class folders of the test split differ from those of the training split.

        Class indices count the folders of a split, so they would not match.
        """
        train, test = (set(class_folders(self.split_folder(root, split), None)) for split in ("train", "test"))
        if self.classes is None and train and test and (unmatched := sorted(train ^ test)):
            raise UserError(
                f"dataset.{self.root_option}: {root} has the class {unmatched[0]} only in its "
                f"{'train' if unmatched[0] in train else 'test'} split ({len(unmatched)} such classes); both splits need the "
                "same class folders."
            )

    def repeat(self, train: Tensor) -> Tensor | None:
        if self.weights is None:
            return None
        sizes = [len(self.list_files(root, "train")[0]) for root in self.roots]
        folders = torch.bucketize(train, torch.tensor(sizes).cumsum(0), right=True)
        members = [train[folders == number] for number in range(len(sizes))]
        for root, own in zip(self.roots, members, strict=True):
            if not len(own):
                raise UserError(
                    f"dataset.weights: no image of {root} is left to train on (dataset.max_images={self.max_images}); raise "
                    "it, or leave the folder out."
                )
        return repeat_to_shares(members, self.weights)

    def class_names(self, label: str) -> list[str]:
        return [name for root in self.roots for name in class_folders(self.split_folder(root, "train"), self.classes)]

    def list_files(self, root: Path, split: Literal["train", "test"]) -> FileList:
        """Return the paths and class indices of a split of one root."""
        if not root.is_dir():
            raise UserError(
                f"dataset.{self.root_option}: {root} is not a folder; expected the folder that holds train/<class>/*.jpg."
            )
        return list_images(self.split_folder(root, split), self.classes)

    def split_folder(self, root: Path, split: Literal["train", "test"]) -> Path:
        """Return the folder of a split of one root."""
        names = ("train",) if split == "train" else self.test_folders
        existing = [root / name for name in names if (root / name).is_dir()]
        if not existing and (split == "test" or any((root / name).is_dir() for name in self.test_folders)):
            remedy = "; add it, or score on the held-out training images: task.split=validation" if split == "test" else ""
            missing = " or ".join(f"{name}/" for name in names)
            raise UserError(f"dataset.{self.root_option}: {root} has no {missing} folder of classes{remedy}.")
        return existing[0] if existing else root


def repeat_to_shares(members: list[Tensor], weights: list[float]) -> Tensor:
    """Concatenate lists of positions, in which positions are repeated until every list has its share; none is left out.

    Args:
        members: Positions of each list, at least one.
        weights: Share of each list in the result, up to a common factor.
    """
    total = max(len(m) / weight for m, weight in zip(members, weights, strict=True))
    counts = [max(len(m), round(weight * total)) for m, weight in zip(members, weights, strict=True)]
    return torch.cat([m[torch.arange(count) % len(m)] for m, count in zip(members, counts, strict=True)])


class ImageFolder(FolderDataModule):
    """Images in class folders, with or without a test split.

    The layout is `root/train/<class>/` and `root/test/<class>/` (or `root/val/<class>/`), or `root/<class>/` without a test
    split. Images beside class folders are left out. Without class folders, the images of the folder itself are used, without
    labels.

    Args:
        root: The folder.
        classes: Names of the class folders to use, or a text file with one name per line; None uses all.
        **common: Options of `FolderDataModule`.
    """

    def __init__(self, root: str, classes: list[str] | str | None, **common: Any) -> None:
        super().__init__([root], None, classes, **common)


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file in UTF-8 that are not blank."""
    if not file.is_file():
        raise UserError(
            f"dataset.classes={file} is no file; expected a text file of class folders, a list of them, or null for all."
        )
    try:
        text = file.read_text(encoding="utf-8-sig")  # without the mark that some editors put at the beginning
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"dataset.classes={file} cannot be read ({error}); save it as plain text in UTF-8.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


class ImageNet(ImageFolder):
    """ImageNet or a subset of its classes, in `root/train/<wnid>/` and `root/val/<wnid>/`.

    Args:
        class_count: Expected number of classes, so that an incomplete copy is noticed.
        **common: Options of `ImageFolder`.
    """

    test_folders = ("val",)  # the official test split has no labels

    def __init__(self, class_count: PositiveInt, **common: Any) -> None:
        super().__init__(**common)
        self.class_count = class_count

    def list_files(self, root: Path, split: Literal["train", "test"]) -> FileList:
        paths, labels = super().list_files(root, split)
        if (num_classes := len(set(labels))) != self.class_count:
            raise UserError(
                f"dataset.root: {root} holds {split} images of {num_classes} classes, expected {self.class_count}; add the "
                "others, name the folders to use in dataset.classes, or use dataset=image_folder for any number of classes."
            )
        return paths, labels


class FolderMixture(FolderDataModule):
    """Several folders as one dataset, each with the layout of `ImageFolder`.

    Equal class names in two folders are different classes.

    Args:
        roots: The folders.
        weights: Share of each folder in an epoch, reached by repeating images; None uses every image once.
        **common: Options of `FolderDataModule`.
    """

    root_option = "roots"

    def __init__(self, roots: list[str], weights: list[PositiveFloat] | None, **common: Any) -> None:
        if not roots:
            raise UserError("dataset.roots=[] is empty; expected at least one folder.")
        if weights is not None and len(weights) != len(roots):
            raise UserError(f"dataset.weights={list(weights)}: expected {len(roots)} positive numbers, one per root, or null.")
        super().__init__(roots, weights, None, **common)
