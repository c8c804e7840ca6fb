"""Datasets: labelled images as uint8 tensors in memory, with a fixed stratified validation split.

A dataset is a class with `load(split) -> Split`. Training sees the training part only; the probes fit on it and are scored
on the validation part; the test split is for `task=evaluate` alone. To add one, write one class here and one YAML.
"""

import logging
import tarfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import functional as TF
from tqdm import tqdm

from hjepa.augment import Augment
from hjepa.errors import UserError
from hjepa.rng import generator
from hjepa.shapes import generate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """`images` uint8 [N, 3, S, S]; `labels` int64 [N] by name, the main one first, -1 where unknown."""

    images: Tensor
    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> "Split":
        return Split(self.images[index], {name: label[index] for name, label in self.labels.items()})

    def to(self, device: torch.device) -> "Split":
        """The split on a device."""
        return Split(self.images.to(device), {name: label.to(device) for name, label in self.labels.items()})


class Dataset(ABC):
    """What all datasets share.

    Args:
        image_size: side of the images in pixels; others are resized and centre-cropped to it.
        validation: share of the training split that is held out, the same for every label.
        mean, std: per channel, in [0, 1], for normalisation.
        augment: applied to training images on the device; views: whole views of each image that it draws.
        local_augment, local_views, local_size: the same for local crops of another size (multi-crop, SwAV), none by default.
    """

    def __init__(
        self,
        image_size: int,
        validation: float,
        mean: list[float],
        std: list[float],
        augment: Augment,
        views: int,
        local_augment: Augment,
        local_views: int,
        local_size: int,
    ) -> None:
        if not 0 < validation < 1:
            raise UserError(f"dataset.validation={validation}: expected a share between 0 and 1.")
        if views < 1 or local_views < 0 or local_size < 1:
            raise UserError(
                f"dataset.views={views}, local_views={local_views} and local_size={local_size}: expected at least 1, 0 and 1."
            )
        self.views, self.local_augment, self.local_views, self.local_size = views, local_augment, local_views, local_size
        self.image_size, self.validation, self.augment = image_size, validation, augment
        self.mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(std).view(-1, 1, 1) * 255

    @abstractmethod
    def load(self, split: Literal["train", "test"]) -> Split:
        """All images of a split."""

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32, zero mean and unit variance over the dataset."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return (images.float() - self.mean) / self.std

    def crops(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Augmented, normalised views of uint8 images [B, 3, S, S], those of one image in a row.

        Returns:
            Whole views float [B * views, 3, S, S] and local crops [B * local_views, 3, local_size, local_size], or None.
        """
        images = self.normalise(images)
        whole = self.augment(images.repeat_interleave(self.views, 0) if self.views > 1 else images, generator)
        if not self.local_views:
            return whole, None
        return whole, self.local_augment(images.repeat_interleave(self.local_views, 0), generator, self.local_size)

    def train_and_validation(self) -> tuple[Split, Split]:
        """The training split without and the part of it that is held out; the same parts for every seed of a run."""
        everything = self.load("train")
        held = stratified(next(iter(everything.labels.values()), torch.zeros(len(everything))), self.validation)
        if not 0 < len(held) < len(everything):
            raise UserError(
                f"dataset.validation={self.validation} of {len(everything)} images leaves no image to "
                f"{'validate' if len(held) == 0 else 'train'} on; use more images or another share."
            )
        keep = torch.ones(len(everything), dtype=torch.bool)
        keep[held] = False
        return everything[keep.nonzero().squeeze(1)], everything[held]


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
    """The embedded procedural dataset (see `hjepa.shapes`): labels `part` (kind of shape) and `whole` (arrangement).

    Args:
        train, test: numbers of images; data_seed: what they are drawn from.
    """

    def __init__(self, train: int, test: int, data_seed: int, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]  # checked against Dataset's own signature
        if min(train, test) < 1:
            raise UserError(f"dataset.train={train} and dataset.test={test} must be at least 1.")
        self.sizes, self.data_seed = {"train": train, "test": test}, data_seed

    def load(self, split: Literal["train", "test"]) -> Split:
        seed = 2 * self.data_seed + (split == "test")
        images, labels = generate(self.sizes[split], self.image_size, seed)
        return Split(images, {name: labels[name] for name in ("part", "whole")})


class ImageFolder(Dataset):
    """JPEG, PNG or other images in `root/train/<class>/` and `root/test/<class>/`, or in `root/<class>/` without a test split;
    images outside class folders have no labels.

    Args:
        root: the folder.
        max_corrupt: share of unreadable images that is tolerated (they are named and left out).
        memory_limit_gb: the most memory that the decoded images of a split may take.
    """

    def __init__(self, root: str, max_corrupt: float, memory_limit_gb: float, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.root, self.max_corrupt, self.memory_limit_gb = Path(root).expanduser(), max_corrupt, memory_limit_gb
        if not self.root.is_dir():
            raise UserError(f"dataset.root={root} is not a folder; give the folder that holds train/<class>/*.jpg.")

    def load(self, split: Literal["train", "test"]) -> Split:
        folder = self.root / split
        if not folder.is_dir():
            if split == "test" or (self.root / "test").is_dir():
                raise UserError(f"dataset.root={self.root} has no {split}/ folder of classes.")
            folder = self.root
        files = list_images(folder)
        size = len(files) * 3 * self.image_size**2 / 2**30
        if size > self.memory_limit_gb:
            raise UserError(
                f"{len(files)} images of {self.image_size} px in {folder} take {size:.1f} GB decoded, more than "
                f"dataset.memory_limit_gb={self.memory_limit_gb}; raise it if the memory is there, or use a smaller image_size."
            )
        return self.decode(files)

    def decode(self, files: list[tuple[str, int]]) -> Split:
        """Decode in threads (PIL releases the interpreter lock), dropping what cannot be read."""
        images = torch.empty(len(files), 3, self.image_size, self.image_size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            decoded: Iterator[np.ndarray | str] = pool.map(lambda file: read_image(file[0], self.image_size), files, chunksize=64)
            bad = []
            for i, image in enumerate(tqdm(decoded, total=len(files), desc="decoding images", disable=None)):
                if isinstance(image, str):
                    bad.append((i, image))
                else:
                    images[i] = torch.from_numpy(image).permute(2, 0, 1)
        if bad:
            self.report_corrupt(len(files), [f"{files[i][0]} ({reason})" for i, reason in bad])
        keep = torch.ones(len(files), dtype=torch.bool)
        keep[[i for i, _ in bad]] = False
        labels = torch.tensor([label for _, label in files])
        images, labels = (images[keep], labels[keep]) if bad else (images, labels)
        return Split(images, {"class": labels} if labels.max() >= 0 else {})

    def report_corrupt(self, total: int, bad: list[str]) -> None:
        """Warn about unreadable images, or refuse when they are more than the tolerated share."""
        named = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        if len(bad) > self.max_corrupt * total:
            raise UserError(
                f"{len(bad)} of {total} images cannot be read, more than dataset.max_corrupt={self.max_corrupt:g} allows: "
                f"{named}. Mend or remove them, or raise dataset.max_corrupt."
            )
        log.warning("left out %d of %d images that cannot be read: %s", len(bad), total, named)


def list_images(folder: Path) -> list[tuple[str, int]]:
    """(path, class index) of every image in the class folders, sorted; class -1 for images outside class folders."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    loose = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
    if loose and not classes:
        return [(path, -1) for path in loose]
    if not classes:
        raise UserError(f"{folder} holds neither images nor class folders; expected {folder}/<class>/*.jpg.")
    files: list[tuple[str, int]] = make_dataset(
        str(folder), {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS, allow_empty=True
    )
    if not files:
        raise UserError(f"The class folders of {folder} hold no images (looked for {', '.join(IMG_EXTENSIONS)}).")
    return files


def read_image(path: str, size: int) -> np.ndarray | str:
    """One image as uint8 [size, size, 3], resized by its shorter side and centre-cropped; or why it cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            file.draft("RGB", (size, size))
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        return str(error).replace(path, "").strip(" :'") or type(error).__name__
    if image.size != (size, size):
        image = TF.center_crop(TF.resize(image, size, antialias=True), [size, size])
    return np.array(image)


class Torchvision(Dataset):
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision, downloaded and checked on first use.

    Args:
        name: the class in torchvision.datasets; root: where the download goes.
        label: what the labels are called.
    """

    def __init__(self, name: Literal["CIFAR10", "CIFAR100", "STL10"], root: str, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.name, self.root = name, root

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
        return Split(resize(pixels.contiguous(), self.image_size), {"class": labels})


def resize(images: Tensor, size: int, chunk: int = 1024) -> Tensor:
    """uint8 [N, 3, S, S] -> [N, 3, size, size], antialiased, in chunks to bound memory."""
    if images.shape[-1] == size:
        return images
    return torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(chunk)])
