"""Sources of image files: where the encoded bytes of an image come from, in a fixed order, with access by position.

`ImageFiles` decodes the images of any source in the same way. A source of your own needs the four methods of `ImageSource`.
"""

import os
from typing import BinaryIO, Protocol, Self

import numpy as np
from torch import Tensor


class ImageSource(Protocol):
    """Encoded images in a fixed order."""

    def __len__(self) -> int:
        """Return the number of images."""

    def select(self, index: Tensor) -> Self:
        """Return the images at some positions int64 [M]."""

    def name(self, position: int) -> str:
        """Return what names an image in messages."""

    def open(self, position: int) -> str | BinaryIO:
        """Return a path or a binary file that Pillow opens."""


class FilePaths:
    """Image files on a disk.

    Args:
        paths: Paths as a bytes array [N]. Workers would copy strings, because counting references writes to them.
    """

    def __init__(self, paths: np.ndarray) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, index: Tensor) -> "FilePaths":
        return FilePaths(self.paths[index.numpy()])

    def name(self, position: int) -> str:
        return os.fsdecode(self.paths[position])

    def open(self, position: int) -> str:
        return self.name(position)
