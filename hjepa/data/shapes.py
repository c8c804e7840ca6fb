"""The procedural dataset `shapes`: hierarchical (Navon-like) figures generated from a seed.

Every image has two or three independent labels, from low to high: the *part*, the shape that all elements have; the *whole*, how
the elements are arranged; and, if elements fade, the *fade*, how the directions in which they do so go together: all up, all
down, all to one side, toward the center of the whole, away from it, or around it. Probes thus tell within minutes which level
of a hierarchy represents which of them. Small networks can learn part and whole almost perfectly; the fade leaves room for
better ones.

Every image has a color for its elements, lighter or darker than a clouded, noisy background. Jitter of position, scale and
angle makes raw pixels linearly useless for all labels, while a person still reads them at 32 pixels. Nuisances are local on
purpose: anything that a whole image shares (a background color, a noise level) predicts every patch, and a predictive
objective learns that first and best (the slow features of Sobal et al. 2022). Here only the labels are shared. No mirror image
(left to right) of a class is another class, so that horizontal flips are a safe augmentation. All elements fade by the same
amount, so that neither the colors of an image nor the number of its dark pixels tell the fade. A single element does not tell
it either, because every direction occurs in several classes.

Scenes are sampled first (`hjepa.data.shapes_scenes`, in units of the image side) and rendered here (`_coverage`, `_contrast`,
`_render`). The same seed therefore shows the same scenes at any size, and masks of the parts follow from the same scenes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import Fraction, NonNegativeInt, PositiveInt
from hjepa.data.datamodule import DataModule, Split
from hjepa.data.shapes_parts import PART_DISTANCES, Array
from hjepa.data.shapes_scenes import FADES as FADES
from hjepa.data.shapes_scenes import LATTICE, NUM_ELEMENTS, Scenes, sample_scenes
from hjepa.data.shapes_scenes import PARTS as PARTS
from hjepa.data.shapes_scenes import WHOLES as WHOLES

MIN_SIZE = 16  # pixels; in smaller images a part spans fewer than four pixels and is unreadable

_NOISE = 0.03  # standard deviation of the pixel noise
_CHUNK_PIXELS = 400 * 32 * 32  # pixels rendered at once; keeps temporary arrays below 50 MB


def _pixel_centers(size: int) -> Array:
    """Return the pixel centers [S] along a side, in image sides with the origin at the center."""
    return ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)


def _coverage(scenes: Scenes, size: int) -> Array:
    """Return the fraction of every pixel that each element covers, [N, E, S, S]; 0 for absent elements."""
    axis = _pixel_centers(size)
    cover = np.zeros((len(scenes), NUM_ELEMENTS, size, size), np.float32)
    for kind, distance in enumerate(PART_DISTANCES.values()):
        image, element = np.nonzero((scenes.part == kind)[:, None] & scenes.present)
        radius, angle = scenes.radius[image, element], scenes.angle[image, element]
        center = scenes.center[image, element]
        x = axis[None, None, :] - center[:, 0, None, None]
        y = axis[None, :, None] - center[:, 1, None, None]
        cos = (np.cos(angle) / radius)[:, None, None]
        sin = (np.sin(angle) / radius)[:, None, None]
        inside = distance(cos * x + sin * y, cos * y - sin * x)
        # Convert distances from unit radius to pixels; the edge of a shape is one pixel wide at any size.
        inside *= (-size * radius)[:, None, None]
        inside += 0.5
        cover[image, element] = np.clip(inside, 0, 1, out=inside)
    return cover


def _contrast(scenes: Scenes, size: int, fade: float) -> Array:
    """Return the contrast of each element with the background at every pixel, [N, E, S, S], relative to that of its color.

    It falls linearly across an element in the direction of its fade. The mean is 1, so that parts are as visible as without.
    """
    axis = _pixel_centers(size)
    cos, sin = (direction(scenes.fade_angle) / scenes.radius for direction in (np.cos, np.sin))
    along_x = cos[..., None] * (axis - scenes.center[..., :1])
    along_y = sin[..., None] * (axis - scenes.center[..., 1:])
    along = along_x[:, :, None, :] + along_y[:, :, :, None]  # from -1 to 1 across an element
    np.clip(along, -1, 1, out=along)
    along *= -fade / 2
    along += 1
    return along


def _render_background(scenes: Scenes, size: int) -> Array:
    """Render backgrounds [N, 3, S, S]: the background color plus the bilinearly interpolated lattice of color offsets."""
    position = (_pixel_centers(size) + 0.5) * (LATTICE - 1)
    weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(LATTICE))).astype(np.float32)  # [S, C]
    background: Array = scenes.color[:, 0, :, None, None] + weight @ scenes.cloud @ weight.T
    return background


def _render(scenes: Scenes, cover: Array, rng: np.random.Generator, fade: float) -> npt.NDArray[np.uint8]:
    """Render images [N, 3, S, S] from the coverage [N, E, S, S] of the elements and the strength of their fade."""
    size = cover.shape[-1]
    image = _render_background(scenes, size)
    opacity = cover * _contrast(scenes, size, fade) if fade else cover
    image += opacity.max(1)[:, None] * (scenes.color[:, 1, :, None, None] - image)
    image += np.float32(_NOISE) * rng.standard_normal(image.shape, np.float32)
    pixels: npt.NDArray[np.uint8] = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels


def _iter_chunks(scenes: Scenes, size: int) -> Iterator[tuple[slice, Scenes, Array]]:
    """Yield the scenes in chunks that bound the memory: their rows, the scenes, and the coverage of their elements."""
    chunk_size = max(1, _CHUNK_PIXELS // size**2)
    for start in range(0, len(scenes), chunk_size):
        rows = slice(start, start + chunk_size)
        chunk = scenes.take(rows)
        yield rows, chunk, _coverage(chunk, size)


def generate(count: int, size: int = 32, seed: int = 0, fade: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Generate labeled images from a seed; the global random state is neither read nor changed.

    Args:
        count: Number of images N.
        size: Image side S in pixels, at least 16; the same seed shows the same scenes at any size.
        seed: Non-negative seed.
        fade: Fraction of its mean contrast that an element loses from one edge to the opposite one.

    Returns:
        Images, uint8 [N, 3, S, S], and labels int64 [N], balanced separately and in combinations: `part`, `whole` and, unless
        `fade` is 0, `fade`, which are indices into `PARTS`, `WHOLES` and `FADES`.
    """
    if size < MIN_SIZE:
        raise UserError(
            f"dataset.image_size={size}: images of the shapes dataset must have at least {MIN_SIZE} pixels to a side."
        )
    scenes = sample_scenes(count, seed)
    images = np.empty((count, 3, size, size), np.uint8)
    noise = np.random.default_rng([seed, 1])  # separate from the scenes, which must not depend on the size
    for rows, chunk, cover in _iter_chunks(scenes, size):
        images[rows] = _render(chunk, cover, noise, fade)
    labels = {"part": scenes.part, "whole": scenes.whole} | ({"fade": scenes.fade} if fade else {})
    return torch.from_numpy(images), {name: torch.from_numpy(values) for name, values in labels.items()}


def patch_parts(count: int, size: int, seed: int, patch: int, coverage: float) -> Tensor:
    """Return the part that every patch of the images of `generate` shows.

    Args:
        count: See `generate`.
        size: See `generate`.
        seed: See `generate`.
        patch: Side of a patch in pixels, a divisor of the size.
        coverage: Fraction of a patch that a part must cover for the patch to show it.

    Returns:
        int64 [N, (size / patch)^2] in raster order: 0 for the background, 1 + index into `PARTS` for a part.
    """
    scenes = sample_scenes(count, seed)
    side = size // patch
    shown = np.empty((count, side * side), np.int64)
    for rows, chunk, cover in _iter_chunks(scenes, size):
        share = cover.max(1).reshape(-1, side, patch, side, patch).mean((2, 4)).reshape(-1, side * side)
        shown[rows] = np.where(share >= coverage, 1 + chunk.part[:, None], 0)
    return torch.from_numpy(shown)


class Shapes(DataModule):
    """The procedural dataset, with the labels `part` (shape of the elements) and `whole` (their arrangement).

    Args:
        train: Number of training images.
        test: Number of test images.
        data_seed: Seed of the images.
        fade: Fraction of its mean contrast that an element loses from one edge to the opposite one. Unless it is 0, there is a
            third label `fade`, how the directions of the fades go together.
        **common: Options of `DataModule`.
    """

    def __init__(
        self, train: PositiveInt, test: PositiveInt, data_seed: NonNegativeInt, fade: Fraction = 0.0, **common: Any
    ) -> None:
        super().__init__(**common)
        self.sizes, self.data_seed, self.fade = {"train": train, "test": test}, data_seed, fade

    def load(self, split: Literal["train", "test"]) -> Split:
        return Split(*generate(self.sizes[split], self.image_size, self.split_seed(split), self.fade))

    def split_seed(self, split: Literal["train", "test"]) -> int:
        """Return the seed of a split."""
        return 2 * self.data_seed + (split == "test")

    def patch_parts(self, split: Literal["train", "test"], patch: int, coverage: float) -> Tensor:
        """Return the part that every patch of a split's images shows, int64 [N, num_patches], see `patch_parts`."""
        return patch_parts(self.sizes[split], self.image_size, self.split_seed(split), patch, coverage)

    def class_names(self, label: str) -> list[str]:
        return list({"part": PARTS, "whole": WHOLES, "fade": FADES}[label])
