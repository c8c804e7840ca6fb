"""Image files: found in class folders, decoded on demand, the unreadable ones replaced, counted and named.

Whether images are decoded into memory once or ahead of every step by workers, `ImageFiles.decode` does it, so the
pixels of an image are the same.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import functional as TF
from tqdm import tqdm

from hjepa.config.errors import UserError

log = logging.getLogger(__name__)

Listing = tuple[list[str], list[int]]  # paths and class indices

Run = Callable[[Callable[[int], Any], list[int]], Iterable[Any]]  # how the images of a list are read: one by one, in threads


class CorruptFiles:
    """The unreadable files of a split that were met so far.

    Args:
        total: files of the split; tolerated: share of them that may be unreadable.
        group: of the options `max_corrupt` and `workers`; fate: what becomes of an unreadable file's place.
    """

    def __init__(self, total: int, tolerated: float, group: str = "dataset", fate: str = "others take their places") -> None:
        self.total, self.tolerated, self.group, self.fate = total, tolerated, group, fate
        self.limit = min(int(tolerated * total), total - 1)
        self.names: set[str] = set()

    def report(self, bad: dict[str, str]) -> None:
        """Warn about unreadable files (name -> reason), or refuse when they have become more than the tolerated share."""
        new = {name: reason for name, reason in bad.items() if name not in self.names}
        self.names |= new.keys()
        if not new:
            return
        named = "; ".join(f"{name} ({reason})" for name, reason in list(new.items())[:5])
        named += f"; and {len(new) - 5} more" if len(new) > 5 else ""
        if len(self.names) > self.limit:
            raise UserError(
                f"{len(self.names)} of {self.total} images cannot be read, more than {self.group}.max_corrupt={self.tolerated:g} "
                f"allows: {named}. Mend or remove them, or raise {self.group}.max_corrupt."
            )
        log.warning("%d of %d images cannot be read, %s: %s", len(self.names), self.total, self.fate, named)


class ImageFiles:
    """Image files in a fixed order. Indexing decodes into memory: `files[:4]` is uint8 [4, 3, S, S].

    An unreadable file is replaced by the next readable one of its label, or of any label where there is none.

    Args:
        paths: bytes [N] (workers would copy strings, by counting the references to them); labels: int64 [N], -1 where unknown.
        size: side of the decoded images in pixels.
        corrupt: shared by the parts of a split.
        workers: see `hjepa.data.stream.Stream`.
    """

    def __init__(self, paths: np.ndarray, labels: Tensor, size: int, corrupt: CorruptFiles, workers: int | None) -> None:
        self.paths, self.labels, self.size, self.corrupt, self.workers = paths, labels, size, corrupt, workers

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        positions = torch.arange(len(self))[index].tolist()
        with ThreadPoolExecutor() as pool:  # PIL releases the interpreter lock

            def run(read: Callable[[int], Any], positions: list[int]) -> Iterable[Any]:
                results = pool.map(read, positions, chunksize=64)
                return tqdm(results, total=len(positions), desc="decoding images", disable=None)

            images, bad = self.decode(positions, run)
        self.corrupt.report(bad)
        return images

    def part(self, index: Tensor) -> "ImageFiles":
        """Some of the files, not decoded."""
        return ImageFiles(self.paths[index.numpy()], self.labels[index], self.size, self.corrupt, self.workers)

    def path(self, position: int) -> str:
        """The path of a file."""
        return os.fsdecode(self.paths[position])

    def decode(self, positions: list[int], run: Run = map) -> tuple[Tensor, dict[str, str]]:
        """The images at the positions, uint8 [B, 3, S, S], and the reasons of the unreadable files met, by path. Once these are
        too many to go on, images stay black.
        """
        images = torch.zeros(len(positions), 3, self.size, self.size, dtype=torch.uint8)
        bad: dict[int, str] = {}
        for position, image, read in zip(positions, images, run(self.read, positions), strict=True):
            put(image, read, bad, position)
        for position, image in zip(positions, images, strict=True):
            if position in bad:
                self.replace(position, image, bad)
        return images, {self.path(position): reason for position, reason in bad.items()}

    def read(self, position: int) -> np.ndarray | str:
        """One image, or why it cannot be read."""
        return read_image(self.path(position), self.size)

    def replace(self, position: int, image: Tensor, bad: dict[int, str]) -> None:
        """Fill an image with the first readable one that may stand for it."""
        for other in self.replacements(position):
            if len(bad) > self.corrupt.limit:
                return
            if other not in bad:
                put(image, self.read(other), bad, other)
            if other not in bad:
                return

    def replacements(self, position: int) -> Iterator[int]:
        """Positions after this one, cyclically: those of its label, then the others."""
        order = torch.arange(position, position + len(self)) % len(self)
        same = self.labels[order] == self.labels[position]
        yield from torch.cat([order[same], order[~same]]).tolist()


def put(image: Tensor, read: np.ndarray | str, bad: dict[int, str], position: int) -> None:
    """Write what was read to image uint8 [3, S, S], or its reason to `bad`."""
    if isinstance(read, str):
        bad[position] = read
    else:
        image.copy_(torch.from_numpy(read).permute(2, 0, 1))


def read_image(path: str, size: int) -> np.ndarray | str:
    """One image as uint8 [size, size, 3], resized by its shorter side and center-cropped; or why it cannot be read."""
    try:
        with catch_warnings(action="ignore"), Image.open(path) as file:
            file.draft("RGB", (size, size))
            image = file.convert("RGB")
    except Exception as error:  # decoders raise all kinds on broken files
        return str(error).replace(path, "").strip(" :'") or type(error).__name__
    if image.size != (size, size):
        image = TF.center_crop(TF.resize(image, size, antialias=True), [size, size])
    return np.array(image)


def walk_images(folder: Path) -> list[str]:
    """Paths of all images in a folder and the folders in it, however deep, sorted."""
    folder = folder.absolute()
    return [path for path, _ in make_dataset(str(folder.parent), {folder.name: 0}, IMG_EXTENSIONS, allow_empty=True)]


def class_folders(folder: Path, chosen: list[str] | None) -> list[str]:
    """Names of the (chosen) class folders, in the order of their indices."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if missing := sorted(set(chosen or ()) - set(classes)):
        raise UserError(
            f"dataset.classes: {folder} has no class folder {missing[0]} ({len(missing)} of {len(chosen or ())} are missing); "
            "give the names of folders that are there."
        )
    return classes if chosen is None else sorted(set(chosen))


def list_images(folder: Path, chosen: list[str] | None = None) -> Listing:
    """Paths and class indices of every image in the (chosen) class folders, sorted; class -1 outside class folders."""
    classes = class_folders(folder, chosen)
    loose = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
    if loose and not classes:
        return loose, [-1] * len(loose)
    if not classes:
        raise UserError(f"{folder} holds neither images nor class folders; expected {folder}/<class>/*.jpg.")
    found = make_dataset(str(folder), {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS, allow_empty=True)
    if not found:
        raise UserError(f"The class folders of {folder} hold no images (looked for {', '.join(IMG_EXTENSIONS)}).")
    return [path for path, _ in found], [label for _, label in found]
