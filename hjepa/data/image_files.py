"""Image files: decoded on demand; unreadable files are replaced, counted and named.

`ImageFiles.decode` reads the images both when they are decoded into memory once and when workers decode them ahead of every
step (`hjepa.data.stream`), so that the pixels are the same.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO
from warnings import catch_warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from hjepa.config.errors import UserError
from hjepa.config.terminal import progress_bar
from hjepa.data.pixels import WHITE, shorten, to_rgb
from hjepa.data.sources import ImageSource

log = logging.getLogger(__name__)

WINDOW = 2048  # images that threads are asked to decode at a time, since a request takes memory

MAX_MEGAPIXELS = 179.0  # the largest images that Pillow decodes unless it is told otherwise

MapFunction = Callable[[Callable[[int], Any], list[int]], Iterable[Any]]  # the built-in `map`, or one that uses threads


class CorruptFiles:
    """The unreadable files of a split that were found so far.

    Args:
        total: Number of files of the split.
        max_share: Fraction of the files that may be unreadable.
        option_group: Config group of the options `max_corrupt`, `max_megapixels` and `workers`, for messages.
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
        source: Where the files are.
        labels: Labels int64 [N]; -1 stands for an unknown label.
        size: Side of the decoded images in pixels.
        corrupt: Unreadable files, shared by all selections from a split.
        workers: Number of decoding processes, see `hjepa.data.stream.Stream`.
        background: Color behind transparent pixels, see `hjepa.data.pixels.to_rgb`.
        max_megapixels: Size in millions of pixels above which images are not decoded.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: Tensor,
        size: int,
        corrupt: CorruptFiles,
        workers: int | None,
        background: Sequence[int] | None = WHITE,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        self.source, self.labels, self.size, self.corrupt, self.workers = source, labels, size, corrupt, workers
        self.background, self.max_megapixels = background, max_megapixels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        positions = torch.arange(len(self))[index].tolist()
        with thread_pool() as pool:  # PIL releases the interpreter lock

            def map_in_threads(read: Callable[[int], Any], positions: list[int]) -> Iterable[Any]:
                results = map_in_windows(pool, read, positions)
                is_main = os.environ.get("RANK", "0") == "0"  # every process of a distributed run decodes the same images
                return progress_bar(results, total=len(positions), desc="decoding images", unit="image", disable=not is_main)

            images, errors = self.decode(positions, map_in_threads)
        self.corrupt.report(errors)
        return images

    def select(self, index: Tensor) -> "ImageFiles":
        """Return some of the files without decoding them."""
        options = (self.size, self.corrupt, self.workers, self.background, self.max_megapixels)
        return ImageFiles(self.source.select(index), self.labels[index], *options)

    def name(self, position: int) -> str:
        """Return what names a file in messages, its path if it has one."""
        return self.source.name(position)

    def decode(self, positions: list[int], map_function: MapFunction = map) -> tuple[Tensor, dict[str, str]]:
        """Decode the images at some positions.

        Returns:
            Images uint8 [B, 3, S, S], and the reason for every unreadable file by name. Once more files are unreadable than
            tolerated, no replacements are searched and images stay black.
        """
        images = torch.zeros(len(positions), 3, self.size, self.size, dtype=torch.uint8)
        errors: dict[int, str] = {}
        with decoder_settings(self.max_megapixels):
            for position, image, pixels in zip(positions, images, map_function(self.read, positions), strict=True):
                copy_pixels(pixels, image, position, errors)
        for position, image in zip(positions, images, strict=True):
            if position in errors:
                self.replace(position, image, errors)
        return images, {self.name(position): reason for position, reason in errors.items()}

    def read(self, position: int) -> np.ndarray | str:
        """Return an image uint8 [S, S, 3], or the reason that it cannot be read."""
        try:
            file = self.source.open(position)
        except OSError as error:
            return error.strerror or str(error)
        return read_image(file, self.size, self.background, f"{self.corrupt.option_group}.max_megapixels")

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


def map_in_windows(pool: ThreadPoolExecutor, read: Callable[[int], Any], positions: list[int]) -> Iterator[Any]:
    """Yield the results of a function in order; at most `WINDOW` calls wait in the pool at a time."""
    for start in range(0, len(positions), WINDOW):
        yield from pool.map(read, positions[start : start + WINDOW])


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that ends with what is running, also after Ctrl-C, instead of doing all that it was given."""
    pool = ThreadPoolExecutor()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def decoder_settings(max_megapixels: float) -> Iterator[None]:
    """Silence the warnings of decoders, which mind oddities, and set the size above which Pillow does not decode.

    Both are settings of the process, so they are set outside of the threads that decode.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = round(max_megapixels * 1e6 / 2)  # Pillow decodes twice as many
    try:
        with catch_warnings(action="ignore"):
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_image(
    source: str | BinaryIO,
    size: int,
    background: Sequence[int] | None = WHITE,
    limit_option: str = "PIL.Image.MAX_IMAGE_PIXELS",
) -> np.ndarray | str:
    """Return an image uint8 [size, size, 3], or the reason that it cannot be read.

    Pixels become 8-bit RGB by the rules of `hjepa.data.pixels`. The shorter side is resized to `size`, and the center is cropped.

    Args:
        source: Path or binary file of the image.
        size: Side of the result.
        background: Color behind transparent pixels.
        limit_option: What sets the number of pixels above which Pillow does not decode, for messages.
    """
    try:
        with Image.open(source) as file:
            file.draft("RGB", (size, size))
            image = to_rgb(file, background)
        if image.size != (size, size):
            image = TF.center_crop(TF.resize(shorten(image), size, antialias=True), [size, size])
    except Image.DecompressionBombError as error:
        return f"{str(error).partition(',')[0]}; raise {limit_option}"
    except Exception as error:  # decoders raise all kinds of exceptions for broken files
        return str(error).replace(repr(source), "").replace(str(source), "").strip(" :'") or type(error).__name__
    return np.array(image)
