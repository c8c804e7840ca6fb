"""Features of a run's images: computed once, at all depths in one pass, kept in the run folder, and read from there.

    evaluate/features/CHECKPOINT-DIGITS/block 3.npy     [N, F], a file for every depth of the encoder and every stacked level

The rows of every table are sources of features: the trained teacher and the untrained one at each depth, and the pixels.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hjepa.config.errors import UserError
from hjepa.config.identity import NOT_IDENTITY_DATASET, short_hash
from hjepa.config.schema import Config
from hjepa.data.datamodule import DataModule, Split, unit
from hjepa.data.stream import Stream
from hjepa.metrics.probes import labeled_indices, standardize
from hjepa.tasks.trained_run import NETWORK_KINDS, NetworkKind, TrainedRun, layer_features
from hjepa.tracking.atomic import atomic_folder

PIXELS = 32  # raw pixels are compared at this side at most: more would be more numbers than images

Subset = Literal["train", "test"]

SUBSETS: tuple[Subset, Subset] = ("train", "test")


@dataclass(frozen=True)
class LabeledImages:
    """Labeled images: some positions of a split."""

    split: Split
    index: Tensor

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        """int64 [N] by name, the main one first."""
        return {name: label[self.index] for name, label in self.split.labels.items()}

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int, device: torch.device, what: str) -> Iterator[Tensor]:
        """The images, uint8 [B, 3, S, S] on the device; streamed ones are decoded ahead."""
        parts = self.index.split(size)
        images = self.split.images
        stream = None if isinstance(images, Tensor) else Stream(images, parts.__getitem__, len(parts), device)
        for step in tqdm(range(len(parts)), desc=what, unit="batch", disable=None):
            yield stream.batch(step) if stream else images[parts[step]].to(device)


class Data:
    """A dataset as an evaluation uses it: images to fit on and images to score on.

    Args:
        node: its config; test: the split to score on.
        train_images, test_images: at most so many, None for all.
    """

    def __init__(
        self,
        dataset: DataModule,
        node: Config,
        test: Literal["test", "validation"],
        train_images: int | None,
        test_images: int | None,
    ) -> None:
        self.dataset, self.test = dataset, test
        self.counts: dict[Subset, int | None] = {"train": train_images, "test": test_images}
        self.key = {name: value for name, value in node.items() if name not in NOT_IDENTITY_DATASET}
        self.key |= {"test": test, "train_images": train_images, "test_images": test_images}

    @cached_property
    def parts(self) -> dict[Subset, LabeledImages]:
        """The labeled images.

        Raises:
            UserError: there are no labels, or none in common, or the images do not have three channels.
        """
        train, validation = self.dataset.train_and_validation()
        splits: dict[Subset, Split] = {
            "train": train,
            "test": validation if self.test == "validation" else self.dataset.load("test"),
        }
        check_labeled(splits)
        return {role: LabeledImages(split, labeled_indices(split, self.counts[role])) for role, split in splits.items()}

    def describe(self) -> str:
        """What is scored on what, in words."""
        train, test = (len(self.parts[role]) for role in ("train", "test"))
        where = "the test split" if self.test == "test" else "the validation part of the training split"
        return f"fitted on {train} images of the training part, scored on {test} of {where}"


def check_labeled(splits: dict[Subset, Split]) -> None:
    """Refuse images without labels or of another format, and scoring on classes that there are none to learn from of."""
    for role, split in splits.items():
        if not split.labels or int(next(iter(split.labels.values())).max()) < 0:
            raise UserError(
                f"The {role} images have no labels, which an evaluation needs; sort them into class folders, or judge the "
                "features on a labeled dataset: task.protocols=[transfer] dataset@task.transfer=cifar100."
            )
        if split.images[:1].shape[1] != 3:
            raise UserError(
                f"The {role} images have {split.images[:1].shape[1]} channels, and the encoder takes 3; convert them."
            )
    for name, label in splits["train"].labels.items():
        other = splits["test"].labels.get(name)
        foreign = set() if other is None else set(other[other >= 0].tolist()) - set(label.tolist())
        if other is None or foreign:
            what = f"the classes {sorted(foreign)[:5]}" if foreign else f"the label {name}"
            raise UserError(f"The images to fit on lack {what} of those to score on; the two need the same classes.")


class Features:
    """The features of a run on a dataset, by source.

    Args:
        folder: where they are kept; depths: of the encoder, ascending, the last block's included; batch_size: images per forward
            pass.
    """

    def __init__(self, run: TrainedRun, data: Data, folder: Path, depths: list[int], batch_size: int) -> None:
        self.run, self.data, self.folder, self.depths, self.batch_size = run, data, folder, depths, batch_size
        self.layer_features = layer_features(run, depths)

    @property
    def key(self) -> dict[str, Any]:
        """What the features are a function of."""
        return self.data.key | {"checkpoint": self.run.hash, "depths": self.depths, "batch_size": self.batch_size}

    def __call__(self, who: NetworkKind, role: Subset) -> dict[str, Tensor]:
        """Features float32 [N, F] by depth and stacked level, mapped from their files."""
        place = self.folder / f"{self.run.hash}-{short_hash(self.key | {'who': who, 'role': role})}"
        if not place.exists():
            self.extract(who, role, place)
        return {
            name: torch.from_numpy(np.load(place / f"{name}.npy", mmap_mode="c")) for name in self.layer_features[who].names()
        }

    def pooled(self, who: NetworkKind, images: Tensor) -> dict[str, Tensor]:
        """Pooled features [B, F] of normalized images [B, 3, S, S], by layer."""
        return {name: tokens.pooled.float() for name, tokens in self.layer_features[who].tokens(images).items()}

    def extract(self, who: NetworkKind, role: Subset, place: Path) -> None:
        """Compute and write them: all or none."""
        part = self.data.parts[role]
        self.folder.mkdir(exist_ok=True)
        with atomic_folder(place) as temporary:
            files: dict[str, np.memmap] = {}
            first = 0
            for images in part.batches(self.batch_size, self.run.hardware.device, f"{who} features, {role}"):
                rows = self.pooled(who, self.run.dataset.normalize(images))
                files = files or self.open(temporary, rows, len(part))
                for name, row in rows.items():
                    files[name][first : first + len(row)] = row.cpu().numpy()
                first += len(images)
            for file in files.values():
                file.flush()

    def open(self, folder: Path, rows: dict[str, Tensor], count: int) -> dict[str, np.memmap]:
        """A file for the features of every row."""
        size = 4 * count * sum(row.shape[1] for row in rows.values())
        if size > (free := shutil.disk_usage(folder).free):  # a mapped file on a full disk would kill the process
            raise UserError(
                f"The features would take {size / 2**30:.1f} GB and {folder.parent} has {free / 2**30:.1f} GB left; choose fewer "
                "task.depths or task.train_images, or free some space."
            )
        shapes = {name: (count, row.shape[1]) for name, row in rows.items()}
        return {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)
            for name, shape in shapes.items()
        }

    def names(self, last_only: bool = False) -> list[str]:
        """The layers of a network; or its last block and the stacked levels."""
        names = self.layer_features["trained"].names()
        return [names[0], *(name for name in names if name.startswith("stacked"))] if last_only else names

    def pairs(self, last_only: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Every row of a table: its name, and what to fit on [N, F] and to score on [M, F], standardized, on the device."""
        device = self.run.hardware.device
        for who in NETWORK_KINDS:
            for name in self.names(last_only):
                train, test = (self(who, role)[name].to(device) for role in SUBSETS)
                yield (f"{who}/{name}", *standardize(train, test))
        train, test = (self.pixels(role).to(device) for role in SUBSETS)
        train, test = standardize(train, test)  # lets the raw ones go, which may be large
        yield "pixels", train, test

    def pixels(self, role: Subset) -> Tensor:
        """The images themselves in [0, 1], float32 [N, F], larger ones averaged down to 32 pixels a side."""
        part, side = self.data.parts[role], min(PIXELS, self.run.encoder.image_size)
        rows = torch.empty(len(part), 3 * side**2)
        first = 0
        for images in part.batches(1024, torch.device("cpu"), f"pixels, {role}"):
            rows[first : first + len(images)] = F.adaptive_avg_pool2d(unit(images), side).flatten(1)
            first += len(images)
        return rows

    def count(self, last_only: bool = False) -> int:
        """How many rows there are."""
        return 2 * len(self.names(last_only)) + 1
