"""Images in tar files, as the package `webdataset` writes them.

Files of a tar file that have the same name up to its first dot are one sample: `0001.jpg` is an image and `0001.cls` its label.
"""

import re
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.terminal import progress_bar
from hjepa.data.file_datamodule import FileDataModule, class_indices
from hjepa.data.image_files import thread_pool
from hjepa.data.tar_index import FOLDER, TarImages, TarIndex, import_webdataset, tar_index

# Patterns of the files of a split; the first one that matches counts.
SPLIT_PATTERNS = {"train": ("*train*.tar",), "test": ("*test*.tar", "*val*.tar")}


class WebDataset(FileDataModule):
    """Images in tar files (shards) on a local or mounted disk.

    Images are read in any order, so that batches are the same as those of the same images in a folder.

    Args:
        root: Folder of the tar files.
        train: Tar files of the training split: names or patterns, with `*` and `{000..146}`. None: `*train*.tar` or, in a folder
            without splits, all tar files.
        test: Tar files of the test split. None: `*test*.tar`, or else `*val*.tar`.
        image: Extension of the images, if samples have several.
        label: Extension of the files that hold the class of an image, a number or a name; `folder` for the name of the folder
            that an image has in the tar file; None for images without labels.
        **files: Options of `FileDataModule`.
    """

    def __init__(
        self,
        root: str,
        train: str | list[str] | None,
        test: str | list[str] | None,
        image: str | None,
        label: str | None,
        **files: Any,
    ) -> None:
        super().__init__(**files)
        self.root, self.image, self.label = Path(root).expanduser(), image, label
        self.patterns = {"train": [train] if isinstance(train, str) else train, "test": [test] if isinstance(test, str) else test}
        self.indices: dict[str, tuple[list[str], list[TarIndex]]] = {}

    def find_images(self, split: Literal["train", "test"]) -> tuple[TarImages, Tensor]:
        files, indices = self.read_indices(split)
        if self.label is not None and not self.class_names("class"):
            raise UserError(
                f"dataset.label={self.label}: no image in the tar files of {self.root} has such a label; set it to the extension "
                f"of the files with the classes, to {FOLDER} for the folders inside of the tar files, or to null with probe=none."
            )
        labels = class_indices(texts(indices), self.class_names("class"), f"dataset.{split}: {self.root}")
        return TarImages.join(files, indices), labels

    def class_names(self, label: str) -> list[str]:
        names = [text for text in np.unique(texts(self.read_indices("train")[1])).tolist() if text]
        return sorted(names, key=int) if all(map(str.isdecimal, names)) else names

    def read_indices(self, split: Literal["train", "test"]) -> tuple[list[str], list[TarIndex]]:
        """Return the tar files of a split and their indices."""
        if split not in self.indices:
            files = self.find_files(split)
            with thread_pool() as pool:  # disks and networks serve several reads at a time
                read = pool.map(partial(tar_index, image=self.image, label=self.label), files)
                indices = list(progress_bar(read, total=len(files), desc="indexing tar files", unit="file"))
            if not any(len(index.names) for index in indices):
                raise UserError(f"dataset.{split}: {files[0]} and the other tar files of this split hold no images.")
            self.indices[split] = [str(file) for file in files], indices
        return self.indices[split]

    def find_files(self, split: Literal["train", "test"]) -> list[Path]:
        """Return the tar files of a split.

        Raises:
            UserError: There are none, or some are missing.
        """
        if not self.root.is_dir():
            raise UserError(f"dataset.root={self.root} is not a folder; expected the folder of the tar files.")
        if patterns := self.patterns[split]:
            return expand(self.root, f"dataset.{split}", patterns)
        by_split = {name: self.default_files(name) for name in SPLIT_PATTERNS}
        found = by_split[split] or ([] if split == "test" or by_split["test"] else sorted(self.root.glob("*.tar")))
        if not found:
            remedy = ", or score on the held-out training images: task.split=validation" if split == "test" else ""
            raise UserError(
                f"dataset.root={self.root} has no {' or '.join(SPLIT_PATTERNS[split])}; set dataset.{split} to the names of its "
                f"tar files{remedy}."
            )
        return found

    def default_files(self, split: str) -> list[Path]:
        """Return the tar files of a split by the usual names."""
        matches = [sorted(self.root.glob(pattern)) for pattern in SPLIT_PATTERNS[split]]
        return next((found for found in matches if found), [])


def texts(indices: list[TarIndex]) -> np.ndarray:
    """Return the labels of the images of several tar files, str [N]."""
    return np.char.decode(np.concatenate([index.labels for index in indices]), "utf-8", "replace")


def expand(root: Path, option: str, patterns: list[str]) -> list[Path]:
    """Return the files that patterns stand for, in their order.

    Raises:
        UserError: A file is missing, no file matches, or a pattern is an address in the network.
    """
    expand_braces = import_webdataset("webdataset.shardlists").expand_urls
    files: list[Path] = []
    for pattern in patterns:
        if re.match(r"\w+:", pattern):
            raise UserError(f"{option}={pattern} is no local file; download the tar files, or mount their storage as a folder.")
        try:
            names = expand_braces(pattern)
        except (ValueError, AssertionError) as error:
            raise UserError(f"{option}={pattern} is no pattern ({error}); an example is train-{{000..146}}.tar.") from error
        found = [file for name in names for file in matches(root, name)]
        missing = [file for file in found if not file.is_file()]
        if missing or not found:
            lacks = f"{len(missing)} of {len(found)} files are missing, for example" if missing else "no file matches in"
            raise UserError(f"{option}={pattern}: {lacks} {(missing or [root])[0]}; copy them, or correct the pattern.")
        files += found
    return files


def matches(root: Path, name: str) -> list[Path]:
    """Return the files that a name stands for, which may be a pattern with `*` and `?` or an absolute path."""
    anchor = Path(name).anchor
    return sorted(Path(anchor or root).glob(name.removeprefix(anchor))) if has_magic(name) else [root / name]
