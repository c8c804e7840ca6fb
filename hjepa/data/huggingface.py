"""Images in the datasets of Hugging Face: on the hub, or in local parquet, arrow and image files.

The package `datasets` prepares a dataset as memory-mapped arrow files, whose rows are read in any order.
"""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from hjepa.config.errors import UserError, first_line, import_optional
from hjepa.data.file_datamodule import FileDataModule, class_indices

SAVED = ("state.json", "dataset_dict.json")  # in a folder written by `save_to_disk`

FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}

CLASS_TYPES = ("int", "uint", "string", "large_string", "bool")  # how the types of columns begin that may hold classes


@dataclass(frozen=True)
class ImageRows:
    """Images in a column of a dataset.

    Attributes:
        rows: A `datasets.Dataset` with only this column, whose images are not decoded.
        column: Name of the column.
        index: Numbers of the rows, int64 [N].
    """

    rows: Any
    column: str
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def select(self, index: Tensor) -> "ImageRows":
        return ImageRows(self.rows, self.column, self.index[index.numpy()])

    def name(self, position: int) -> str:
        return f"row {self.index[position]}"

    def open(self, position: int) -> str | BinaryIO:
        value = self.rows[int(self.index[position])][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str | bytes):
            raise OSError(f"no image in the column {self.column}")
        return io.BytesIO(value) if isinstance(value, bytes) else value


class HuggingFaceDataset(FileDataModule):
    """A dataset that the package `datasets` reads.

    Args:
        path: Name on the hub (`owner/name`), or a local folder or file: parquet, arrow, images, or what `save_to_disk` wrote.
        subset: Name of the configuration of a dataset that has several.
        revision: Version on the hub (a branch, tag or commit); None: the newest.
        train: Name of the training split.
        test: Name of the test split.
        image: Column of the images; None: the only column of that kind.
        label: Column of the classes; None for images without labels.
        **files: Options of `FileDataModule`.
    """

    def __init__(
        self,
        path: str,
        subset: str | None,
        revision: str | None,
        train: str,
        test: str,
        image: str | None,
        label: str | None,
        **files: Any,
    ) -> None:
        super().__init__(**files)
        self.path, self.subset, self.revision, self.image, self.label = path, subset, revision, image, label
        self.splits = {"train": train, "test": test}

    def find_images(self, split: Literal["train", "test"]) -> tuple[ImageRows, Tensor]:
        rows = self.rows(split)
        column = self.image_column(rows)
        images = rows.select_columns([column])
        if is_image_feature(rows.features[column]):
            images = images.cast_column(column, self.package.Image(decode=False))
        return ImageRows(images, column, np.arange(len(rows))), self.labels(split)

    @cached_property
    def package(self) -> Any:
        """The package `datasets`."""
        return import_optional("datasets", "dataset=huggingface", "export the images and use dataset=image_folder")

    @cached_property
    def loaded(self) -> Any:
        """All splits by name.

        Raises:
            UserError: There is no such dataset, or it cannot be read.
        """
        local = Path(self.path).expanduser()
        options = {"name": self.subset} | ({} if local.exists() else {"revision": self.revision})
        try:
            if any((local / name).exists() for name in SAVED):
                loaded = self.package.load_from_disk(str(local))
                return {"train": loaded} if isinstance(loaded, self.package.Dataset) else loaded
            if local.suffix in FILE_BUILDERS:
                return self.package.load_dataset(FILE_BUILDERS[local.suffix], data_files=str(local))
            return self.package.load_dataset(str(local) if local.exists() else self.path, **options)
        except Exception as error:  # the package raises all kinds of exceptions, also those of the network
            raise UserError(
                f"dataset.path={self.path} cannot be read ({type(error).__name__}: {first_line(error)}); expected a dataset on "
                "the hub, as owner/name, or a local folder or file of parquet, arrow or images."
            ) from error

    def rows(self, split: Literal["train", "test"]) -> Any:
        """Return a split."""
        name = self.splits[split]
        if name not in self.loaded:
            remedy = ", or score on the held-out training images: task.split=validation" if split == "test" else ""
            raise UserError(
                f"dataset.{split}={name}: {self.path} has no such split; set dataset.{split} to one of "
                f"{', '.join(self.loaded)}{remedy}."
            )
        if not len(self.loaded[name]):
            raise UserError(f"dataset.{split}={name}: this split of {self.path} has no rows; choose another.")
        return self.loaded[name]

    def image_column(self, rows: Any) -> str:
        """Return the name of the column of the images."""
        of_images = [name for name, feature in rows.features.items() if is_image_feature(feature)]
        if self.image is None and len(of_images) == 1:
            return of_images[0]
        if self.image is not None and self.image in rows.features:
            return self.image
        asked = f"dataset.image={self.image}" if self.image else "dataset.image"
        kind, columns = ("columns of images", of_images) if of_images else ("columns", list(rows.features))
        raise UserError(f"{asked} does not name the images of {self.path}; its {kind} are {', '.join(columns)}.")

    def class_names(self, label: str) -> list[str]:
        if self.label is None:
            return []
        feature = self.label_feature("train")
        if names := getattr(feature, "names", None):
            return list(names)
        return [str(value) for value in sorted(set(self.rows("train").unique(self.label)) - {None})]

    def labels(self, split: Literal["train", "test"]) -> Tensor:
        """Return the classes int64 [N], in the order of `class_names`; -1 for an unknown one."""
        rows = self.rows(split)
        if self.label is None:
            return torch.full((len(rows),), -1)
        is_encoded = hasattr(self.label_feature(split), "names")  # the values are class indices
        values = list(rows[self.label])
        if is_encoded:
            return torch.tensor([-1 if value is None else value for value in values])
        texts = np.array(["" if value is None else str(value) for value in values])
        return class_indices(texts, self.class_names("class"), f"dataset.{split}={self.splits[split]}")

    def label_feature(self, split: Literal["train", "test"]) -> Any:
        """Return the type of the column of the classes.

        Raises:
            UserError: There is no such column, or it does not hold classes.
        """
        features = self.rows(split).features
        suitable = [name for name, feature in features.items() if str(getattr(feature, "dtype", "")).startswith(CLASS_TYPES)]
        if self.label not in suitable:
            known = "does not hold classes" if self.label in features else "does not exist"
            raise UserError(
                f"dataset.label={self.label}: this column of {self.path} {known}; set it to "
                f"{'one of ' if len(suitable) > 1 else ''}{', '.join([*suitable, 'null for images without labels'])}."
            )
        return features[self.label]


def is_image_feature(feature: Any) -> bool:
    """Return whether a column holds images by its type."""
    return type(feature).__name__ == "Image"
