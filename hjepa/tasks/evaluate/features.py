"""Features of a run's images: computed in one pass for all depths, stored in the run folder, and read from there.

    evaluate/features/CHECKPOINT-HASH/block 3.npy     [N, F], a file per layer of the encoder and per stacked level

Every row of an evaluation's table is a source of features: the trained or the untrained network at one layer, or the pixels. A
run that started from given weights has one more network, "initial". With `model.features=all`, the features of all layers side by
side are one more layer, "all blocks".
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import NotApplicable, UserError
from hjepa.config.identity import NOT_IDENTITY_DATASET, short_hash
from hjepa.config.schema import Config
from hjepa.config.terminal import progress_bar
from hjepa.data.datamodule import DataModule, Split, to_unit_range
from hjepa.data.stream import Stream
from hjepa.metrics.probes import extract_features, labeled_indices, standardize
from hjepa.tasks.trained_run import NetworkKind, TrainedRun, layer_features
from hjepa.tracking.atomic import atomic_folder

PIXEL_SIZE = 32  # larger images are averaged down to this side: more pixels would give more numbers per image than images

Subset = Literal["train", "test"]

SourceKind = NetworkKind | Literal["pixels"]

SUBSETS: tuple[Subset, Subset] = ("train", "test")


@dataclass(frozen=True)
class LabeledImages:
    """Labeled images of a split, or images of a split without labels.

    Attributes:
        split: Split that contains the images.
        index: Positions of the images in the split, int64 [N].
    """

    split: Split
    index: Tensor

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        """Labels int64 [N] by name, the main one first."""
        return {name: label[self.index] for name, label in self.split.labels.items()}

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int, device: torch.device, description: str) -> Iterator[Tensor]:
        """Yield the images, uint8 [B, 3, S, S] on the device, with a progress bar; files are decoded ahead."""
        positions = self.index.split(size)
        images = self.split.images
        stream = None if isinstance(images, Tensor) else Stream(images, positions.__getitem__, size, len(positions), device)
        for step in progress_bar(range(len(positions)), desc=description, unit="batch", leave=None):
            yield stream.batch(step) if stream else images[positions[step]].to(device)


class EvalData:
    """The images of a dataset to fit to and those to score on.

    Args:
        dataset: Dataset.
        node: Config of the dataset.
        test: Split to score on.
        train_images: Largest number of images to fit to, None for all.
        test_images: Largest number of images to score on, None for all.
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
        self.limits: dict[Subset, int | None] = {"train": train_images, "test": test_images}
        self.options = {name: value for name, value in node.items() if name not in NOT_IDENTITY_DATASET}
        self.options |= {"test": test, "train_images": train_images, "test_images": test_images}

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that determines the images and their labels.

        Raises:
            UserError: If a split does not exist.
        """
        splits: set[Subset] = {"train", "test"} if self.test == "test" else {"train"}
        contents = {split: content for split in sorted(splits) if (content := self.dataset.fingerprint(split))}
        return self.options | ({"contents": contents} if contents else {})

    @cached_property
    def subsets(self) -> dict[Subset, LabeledImages]:
        """The labeled images; those of a split without labels are all of its images.

        Raises:
            UserError: If a split does not exist, or its images do not have three channels.
        """
        train, validation = self.dataset.train_and_validation()
        splits: dict[Subset, Split] = {
            "train": train,
            "test": validation if self.test == "validation" else self.dataset.load("test"),
        }
        check_channels(splits)
        return {subset: LabeledImages(split, chosen_indices(split, self.limits[subset])) for subset, split in splits.items()}

    @cached_property
    def labels(self) -> list[tuple[str, Tensor, Tensor]]:
        """The name of every label, its values to fit to [N] and to score on [M], in the order of the images.

        Labels of which either set knows no value are left out; a value of -1 is unknown.

        Raises:
            UserError: If the images have no labels, or those to score on have others.
        """
        check_labels({subset: images.split for subset, images in self.subsets.items()})
        train, test = (self.subsets[subset].labels for subset in SUBSETS)
        return [(name, train[name], test[name]) for name in train if min(train[name].max(), test[name].max()) >= 0]

    def describe(self) -> str:
        """Return the numbers and the origin of the images in words."""
        train, test = (len(self.subsets[subset]) for subset in SUBSETS)
        origin = "the test split" if self.test == "test" else "the validation part of the training split"
        return f"fitted to {train} images of the training part, scored on {test} of {origin}"


def has_labels(split: Split) -> bool:
    """Return whether any image of a split has a known main label."""
    return bool(split.labels) and int(next(iter(split.labels.values())).max()) >= 0


def chosen_indices(split: Split, count: int | None) -> Tensor:
    """Return the positions of at most `count` labeled images, or of at most `count` images of a split without labels."""
    return labeled_indices(split if has_labels(split) else replace(split, labels={"": torch.zeros(len(split))}), count)


def check_channels(splits: dict[Subset, Split]) -> None:
    """Raise `UserError` for images without three channels."""
    for subset, split in splits.items():
        if (channels := split.images[:1].shape[1]) != 3:
            raise UserError(f"The {subset} images have {channels} channels, and the encoder takes 3; convert the images.")


def check_labels(splits: dict[Subset, Split]) -> None:
    """Raise `NotApplicable` for images without labels, and `UserError` for classes that only the scored images have."""
    if not has_labels(splits["train"]):
        raise NotApplicable(
            "The training images have no labels, which this protocol needs; sort them into class folders, or evaluate the "
            "features on a labeled dataset: protocol=[transfer] dataset@protocol.transfer.dataset=cifar100."
        )
    if not has_labels(splits["test"]):
        raise UserError("The test images have no labels; score on the held-out training images: task.split=validation.")
    for name, label in splits["train"].labels.items():
        scored = splits["test"].labels.get(name)
        unknown = set() if scored is None else set(scored[scored >= 0].tolist()) - set(label.tolist())
        if scored is None or unknown:
            missing = f"the classes {sorted(unknown)[:5]}" if unknown else f"the label {name}"
            raise UserError(f"The images to fit to lack {missing} of the images to score on; both need the same classes.")


class Features:
    """The features of a run on a dataset, by source.

    Args:
        run: Run.
        data: Images.
        folder: Folder to store the features in.
        depths: Numbers of the encoder's layers in ascending order, the last one included.
        batch_size: Number of images per forward pass.
    """

    def __init__(self, run: TrainedRun, data: EvalData, folder: Path, depths: list[int], batch_size: int) -> None:
        self.run, self.data, self.folder, self.depths, self.batch_size = run, data, folder, depths, batch_size
        self.networks = layer_features(run, depths, run.initial)

    @property
    def key(self) -> dict[str, Any]:
        """Everything that determines the features."""
        initial = {"initial": True} if self.run.initial else {}
        return self.data.key | {"checkpoint": self.run.hash, "depths": self.depths, "batch_size": self.batch_size} | initial

    def layers(self, last_only: bool = False) -> list[str]:
        """Return the names of all layers, or only of the one with the encoder's own features and of the stacked levels."""
        names = self.networks["trained"].names()
        return [names[0], *(name for name in names if name.startswith("stacked"))] if last_only else names

    def num_sources(self, last_only: bool = False) -> int:
        """Return the number of sources that `sources` yields."""
        return len(self.networks) * len(self.layers(last_only)) + 1

    def sources(self, last_only: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name of every source, and its standardized features to fit to [N, F] and to score on [M, F] on the device."""
        device = self.run.hardware.device
        for kind in self.networks:
            for layer in self.layers(last_only):
                train, test = (self.load(kind, subset)[layer].to(device) for subset in SUBSETS)
                train, test = standardize(train, test)  # frees the raw features, which may be large
                yield f"{kind}/{layer}", train, test
        train, test = (self.pixels(subset).to(device) for subset in SUBSETS)
        train, test = standardize(train, test)
        yield "pixels", train, test

    def load(self, kind: SourceKind, subset: Subset) -> dict[str, Tensor]:
        """Return the features float32 [N, F] by layer, memory-mapped; compute them first if they are not stored."""
        folder = self.folder / f"{self.run.hash}-{short_hash(self.key | {'kind': kind, 'subset': subset})}"
        if not folder.exists():
            self.compute(kind, subset, folder)
        names = ["pixels"] if kind == "pixels" else self.layers()
        return {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in names}

    def batches(self, kind: SourceKind, subset: Subset) -> Iterator[dict[str, Tensor]]:
        """Yield the features float32 [B, F] of all layers, or the pixels in [0, 1], averaged to at most `PIXEL_SIZE` a side."""
        images = self.data.subsets[subset]
        if kind == "pixels":
            side = min(PIXEL_SIZE, self.run.encoder.image_size)
            batches = images.batches(self.batch_size, torch.device("cpu"), f"averaging pixels ({subset})")
            return ({"pixels": F.adaptive_avg_pool2d(to_unit_range(batch), side).flatten(1)} for batch in batches)
        batches = images.batches(self.batch_size, self.run.hardware.device, f"extracting features ({kind}, {subset})")
        return extract_features(self.networks[kind], batches, self.run.dataset.normalize)

    def compute(self, kind: SourceKind, subset: Subset, folder: Path) -> None:
        """Compute and store the features of all layers, or the pixels."""
        self.folder.mkdir(exist_ok=True)
        with atomic_folder(folder) as temporary:
            files: dict[str, np.memmap] = {}
            first = 0
            for features in self.batches(kind, subset):
                files = files or self.create_files(temporary, features, len(self.data.subsets[subset]))
                for layer, rows in features.items():
                    files[layer][first : first + len(rows)] = rows.cpu().numpy()
                first += len(rows)
            for file in files.values():
                file.flush()

    def create_files(self, folder: Path, features: dict[str, Tensor], count: int) -> dict[str, np.memmap]:
        """Create a file for the features of `count` images per layer, as wide as these features [B, F]."""
        size = 4 * count * sum(rows.shape[1] for rows in features.values())
        if size > (free := shutil.disk_usage(folder).free):  # a memory-mapped file on a full disk would kill the process
            raise UserError(
                f"The features would take {size / 2**30:.1f} GB and {folder.parent} has {free / 2**30:.1f} GB left; choose fewer "
                "task.depths or task.train_images, or free some space."
            )
        shapes = {layer: (count, rows.shape[1]) for layer, rows in features.items()}
        return {
            layer: np.lib.format.open_memmap(folder / f"{layer}.npy", mode="w+", dtype=np.float32, shape=shape)
            for layer, shape in shapes.items()
        }

    def pixels(self, subset: Subset) -> Tensor:
        """Return the pixels [N, F] of `batches`; those of streamed images are stored, since decoding them again takes long."""
        images = self.data.subsets[subset]
        if not isinstance(images.split.images, Tensor):
            return self.load("pixels", subset)["pixels"]
        pixels = torch.empty(len(images), 3 * min(PIXEL_SIZE, self.run.encoder.image_size) ** 2)
        first = 0
        for batch in self.batches("pixels", subset):
            pixels[first : first + len(batch["pixels"])] = batch["pixels"]
            first += len(batch["pixels"])
        return pixels
