"""Image files: decoded on demand; unreadable files are replaced, counted and named.

`ImageFiles.decode` reads the images both when they are decoded into memory once and when workers decode them ahead of every
step (`hjepa.data.stream`), so that the pixels are the same.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from warnings import catch_warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from hjepa.config.errors import UserError
from hjepa.config.terminal import progress_bar
from hjepa.data.pixels import WHITE, to_rgb

log = logging.getLogger(__name__)

MapFunction = Callable[[Callable[[int], Any], list[int]], Iterable[Any]]  # the built-in `map`, or one that uses threads


class CorruptFiles:
    """The unreadable files of a split that were found so far.

    Args:
        total: Number of files of the split.
        max_share: Fraction of the files that may be unreadable.
        option_group: Config group of the options `max_corrupt` and `workers`, for messages.
        consequence: How unreadable files are treated, for messages.
    """

    def __init__(
        self, total: int, max_share: float, option_group: str = "dataset", consequence: str = "others take their places"
    ) -> None:
        self.total, self.max_share, self.option_group, self.consequence = total, max_share, option_group, consequence
        self.max_count = min(int(max_share * total), total - 1)
        self.names: set[str] = set()

    def report(self, errors: dict[str, str]) -> None:
        """Warn about unreadable files.

        Args:
            errors: The reason for every file, by path.

        Raises:
            UserError: More than the tolerated share of the files cannot be read.
        """
        new = {name: reason for name, reason in errors.items() if name not in self.names}
        self.names |= new.keys()
        if not new:
            return
        listed = "; ".join(f"{name} ({reason})" for name, reason in list(new.items())[:5])
        listed += f"; and {len(new) - 5} more" if len(new) > 5 else ""
        if len(self.names) > self.max_count:
            option = f"{self.option_group}.max_corrupt"
            raise UserError(
                f"{len(self.names)} of {self.total} images cannot be read, more than {option}={self.max_share:g} allows: "
                f"{listed}. Repair or remove them, or raise {option}."
            )
        log.warning("%d of %d images cannot be read, %s: %s", len(self.names), self.total, self.consequence, listed)


class ImageFiles:
    """Image files in a fixed order; indexing decodes into memory, so that `files[:4]` is uint8 [4, 3, S, S].

    An unreadable file is replaced by the next readable one of its label or, if there is none, of any label.

    Args:
        paths: Paths as a bytes array [N]. Workers would copy strings, because counting references writes to them.
        labels: Labels int64 [N]; -1 stands for an unknown label.
        size: Side of the decoded images in pixels.
        corrupt: Unreadable files, shared by all selections from a split.
        workers: Number of decoding processes, see `hjepa.data.stream.Stream`.
        background: Color behind transparent pixels, see `hjepa.data.pixels.to_rgb`.
    """

    def __init__(
        self,
        paths: np.ndarray,
        labels: Tensor,
        size: int,
        corrupt: CorruptFiles,
        workers: int | None,
        background: Sequence[int] | None = WHITE,
    ) -> None:
        self.paths, self.labels, self.size, self.corrupt, self.workers = paths, labels, size, corrupt, workers
        self.background = background

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        positions = torch.arange(len(self))[index].tolist()
        with ThreadPoolExecutor() as pool:  # PIL releases the interpreter lock

            def map_in_threads(read: Callable[[int], Any], positions: list[int]) -> Iterable[Any]:
                results = pool.map(read, positions, chunksize=64)
                is_main = os.environ.get("RANK", "0") == "0"  # every process of a distributed run decodes the same images
                return progress_bar(results, total=len(positions), desc="decoding images", unit="image", disable=not is_main)

            images, errors = self.decode(positions, map_in_threads)
        self.corrupt.report(errors)
        return images

    def select(self, index: Tensor) -> "ImageFiles":
        """Return some of the files without decoding them."""
        return ImageFiles(self.paths[index.numpy()], self.labels[index], self.size, self.corrupt, self.workers, self.background)

    def path(self, position: int) -> str:
        """Return the path of a file."""
        return os.fsdecode(self.paths[position])

    def decode(self, positions: list[int], map_function: MapFunction = map) -> tuple[Tensor, dict[str, str]]:
        """Decode the images at some positions.

        Returns:
            Images uint8 [B, 3, S, S], and the reason for every unreadable file by path. Once more files are unreadable than
            tolerated, no replacements are searched and images stay black.
        """
        images = torch.zeros(len(positions), 3, self.size, self.size, dtype=torch.uint8)
        errors: dict[int, str] = {}
        with catch_warnings(action="ignore"):  # decoders warn of oddities; set here, since the filters are not thread-safe
            for position, image, pixels in zip(positions, images, map_function(self.read, positions), strict=True):
                copy_pixels(pixels, image, position, errors)
        for position, image in zip(positions, images, strict=True):
            if position in errors:
                self.replace(position, image, errors)
        return images, {self.path(position): reason for position, reason in errors.items()}

    def read(self, position: int) -> np.ndarray | str:
        """Return an image uint8 [S, S, 3], or the reason that it cannot be read."""
        return read_image(self.path(position), self.size, self.background)

    def replace(self, position: int, image: Tensor, errors: dict[int, str]) -> None:
        """Fill an image with the first readable one that may replace it."""
        for other in self.replacements(position):
            if len(errors) > self.corrupt.max_count:
                return
            if other not in errors:
                copy_pixels(self.read(other), image, other, errors)
            if other not in errors:
                return

    def replacements(self, position: int) -> Iterator[int]:
        """Yield the positions after this one, cyclically: first those of its label, then all others."""
        order = torch.arange(position, position + len(self)) % len(self)
        same = self.labels[order] == self.labels[position]
        yield from torch.cat([order[same], order[~same]]).tolist()


def copy_pixels(pixels: np.ndarray | str, image: Tensor, position: int, errors: dict[int, str]) -> None:
    """Copy pixels [S, S, 3] to an image [3, S, S], or store the reason that they could not be read."""
    if isinstance(pixels, str):
        errors[position] = pixels
    else:
        image.copy_(torch.from_numpy(pixels).permute(2, 0, 1))


def read_image(path: str, size: int, background: Sequence[int] | None = WHITE) -> np.ndarray | str:
    """Return an image uint8 [size, size, 3], or the reason that it cannot be read.

    Pixels become 8-bit RGB by the rules of `hjepa.data.pixels`. The shorter side is resized to `size`, and the center is cropped.
    """
    try:
        with Image.open(path) as file:
            file.draft("RGB", (size, size))
            image = to_rgb(file, background)
    except Exception as error:  # decoders raise all kinds of exceptions for broken files
        return str(error).replace(path, "").strip(" :'") or type(error).__name__
    if image.size != (size, size):
        image = TF.center_crop(TF.resize(image, size, antialias=True), [size, size])
    return np.array(image)
