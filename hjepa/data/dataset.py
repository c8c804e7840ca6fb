"""Datasets: labelled images, as uint8 tensors in memory or as files that are streamed, with a fixed stratified validation split.

A dataset is a class with `load(split) -> Split`. Training sees the training part only; the probes fit on it and are scored
on the validation part; the test split is for `task=evaluate` alone. To add one, write one class here and one YAML.
"""

import logging
import os
import tarfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torchvision import datasets
from torchvision.transforms import functional as TF

from hjepa.data.augment import Augment, Draws
from hjepa.data.files import Corrupt, Files, Listing, class_folders, list_images
from hjepa.data.shapes import PARTS, WHOLES, generate, patch_parts
from hjepa.errors import UserError
from hjepa.rng import generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """`images` uint8 [N, 3, S, S], or files that become such a tensor where they are indexed; `labels` int64 [N] by name, the
    main one first, -1 where unknown.
    """

    images: Tensor | Files
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> "Split":
        return Split(self.images[index], {name: label[index] for name, label in self.labels.items()})


class Dataset(ABC):
    """What all datasets share.

    Args:
        image_size: side of the images in pixels; others are resized and centre-cropped to it.
        validation: share of the training split that is held out, the same for every label.
        mean, std: per channel, in [0, 1], for normalisation.
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

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32, zero mean and unit variance over the dataset."""
        return self.standardise(unit(images))

    def standardise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] -> zero mean and unit variance over the dataset, in place."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return images.sub_(self.mean).div_(self.std)

    def draw(self, count: int, generator: Generator) -> Draws:
        """The random numbers that decide what becomes of `count` images."""
        whole, local = (
            self.augment.draw(count * views, generator).unflatten(1, (count, views)) for views in (self.views, self.local_views)
        )
        return Draws(whole, local)

    def crops(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Augmented, normalised views of uint8 images [B, 3, S, S], those of one image in a row.

        Returns:
            Whole views float [B * views, 3, S, S] and local crops [B * local_views, 3, local_size, local_size], or None.
        """
        images = unit(images)
        repeated = images.repeat_interleave(self.views, 0) if self.views > 1 else images
        whole = self.augment(repeated, draws.whole.flatten(1))
        if not self.local_views:
            return self.standardise(whole), None
        repeated = images.repeat_interleave(self.local_views, 0)
        local = self.augment(repeated, draws.local.flatten(1), self.local_size, self.local_scale)
        return self.standardise(whole), self.standardise(local)

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


class Shapes(Dataset):
    """The embedded procedural dataset (see `hjepa.data.shapes`): labels `part` (kind of shape) and `whole` (arrangement).

    Args:
        train, test: numbers of images; data_seed: what they are drawn from.
    """

    def __init__(self, train: int, test: int, data_seed: int, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]  # checked against Dataset's own signature
        if min(train, test) < 1:
            raise UserError(f"dataset.train={train} and dataset.test={test} must be at least 1.")
        self.sizes, self.data_seed = {"train": train, "test": test}, data_seed

    def load(self, split: Literal["train", "test"]) -> Split:
        images, labels = generate(self.sizes[split], self.image_size, self.seed(split))
        return Split(images, {name: labels[name] for name in ("part", "whole")})

    def seed(self, split: Literal["train", "test"]) -> int:
        """What a split is drawn from."""
        return 2 * self.data_seed + (split == "test")

    def patch_parts(self, split: Literal["train", "test"], patch: int, coverage: float) -> Tensor:
        """What every patch of the split's images shows, int64 [N, patches], see `hjepa.data.shapes.patch_parts`."""
        return patch_parts(self.sizes[split], self.image_size, self.seed(split), patch, coverage)

    def class_names(self, label: str) -> list[str]:
        return list({"part": PARTS, "whole": WHOLES}[label])


class Folders(Dataset):
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
                self.refuse_other_classes(root)
        return self.split(files, self.streams(len(files)))

    def refuse_other_classes(self, root: Path) -> None:
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
        unlabelled = files.labels.max() < 0
        keep, held = self.parts(torch.zeros(len(files)) if unlabelled else files.labels)
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

    def join(self, listings: list[Listing]) -> Files:
        """The files of all roots; classes of different roots are different labels."""
        first, labels = 0, []
        for _, classes in listings:
            label = torch.tensor(classes)
            labels.append(torch.where(label < 0, label, label + first))
            first += max(classes) + 1
        paths = np.array([os.fsencode(path) for found, _ in listings for path in found])
        return Files(paths, torch.cat(labels), self.image_size, Corrupt(len(paths), self.max_corrupt), self.workers)

    def streams(self, count: int) -> bool:
        """Whether so many images are too many for the memory; says so."""
        size = count * 3 * self.image_size**2 / 2**30
        if size > self.memory_limit_gb:
            log.info(
                "%d images would take %.3g GB, more than dataset.memory_limit_gb=%g: workers decode them during training",
                *(count, size, self.memory_limit_gb),
            )
        return size > self.memory_limit_gb

    def split(self, files: Files, streamed: bool) -> Split:
        """The files as a split; a streamed one is decoded where it is indexed."""
        return Split(files if streamed else files[:], {"class": files.labels} if files.labels.max() >= 0 else {})


def weigh(positions: Tensor, sizes: list[int], weights: list[float]) -> Tensor:
    """Positions in lists of these sizes, one after the other, repeated until every list has its share; none is left out."""
    lists = torch.bucketize(positions, torch.tensor(sizes).cumsum(0), right=True)
    members = [positions[lists == i] for i in range(len(sizes))]
    whole = max(len(m) / weight for m, weight in zip(members, weights, strict=True))
    counts = [max(len(m), round(weight * whole)) for m, weight in zip(members, weights, strict=True)]
    return torch.cat([m[torch.arange(count) % len(m)] for m, count in zip(members, counts, strict=True)])


class ImageFolder(Folders):
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


class Mixture(Folders):
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


class Torchvision(Dataset):
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision, downloaded and checked on first use.

    Args:
        name: the class in torchvision.datasets; root: where the download goes.
        label: what the labels are called.
    """

    def __init__(self, name: Literal["CIFAR10", "CIFAR100", "STL10"], root: str, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.name, self.root = name, root
        self.names: list[str] = []  # known once the files are there

    def load(self, split: Literal["train", "test"]) -> Split:
        try:
            if self.name == "STL10":  # its unlabelled images (-1) are for training too
                data = datasets.STL10(self.root, split="train+unlabeled" if split == "train" else "test", download=True)
                pixels, labels = torch.from_numpy(data.data), torch.from_numpy(data.labels).long()
            else:
                data = getattr(datasets, self.name)(self.root, train=split == "train", download=True)
                pixels, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(
                f"{self.name} could not be downloaded to or read from dataset.root={self.root} ({error}); check the network, "
                "the folder and its space, or put the archive there by hand."
            ) from error
        self.names = list(data.classes)
        return Split(resize(pixels.contiguous(), self.image_size), {"class": labels})

    def class_names(self, label: str) -> list[str]:
        return self.names


def resize(images: Tensor, size: int, chunk: int = 1024) -> Tensor:
    """uint8 [N, 3, S, S] -> [N, 3, size, size], antialiased, in chunks to bound memory."""
    if images.shape[-1] == size:
        return images
    return torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(chunk)])
