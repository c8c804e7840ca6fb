"""The procedural dataset `shapes`: hierarchical (Navon-like) figures generated from a seed.

Every image has two independent labels: the *whole*, how several elements are arranged, and the *part*, the shape that all
elements have. Probes thus tell within minutes which level of a hierarchy represents which of the two.

Every element has its own color, lighter or darker than a clouded, noisy background. Jitter of position, scale and angle
makes raw pixels linearly useless for both labels, while a person still reads them at 32 pixels. Nuisances are local on
purpose: anything that a whole image shares (a background color, a noise level) predicts every patch, and a predictive
objective learns that first and best (the slow features of Sobal et al. 2022). Here only the labels are shared. No mirror image
(left to right) of a class is another class, so that horizontal flips are a safe augmentation.

Scenes are sampled first (`_sample_scenes`, in units of the image side) and rendered afterwards (`_coverage`, `_render`). The
same seed therefore shows the same scenes at any size, and masks of the parts follow from the same scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeInt, PositiveInt
from hjepa.data.datamodule import DataModule, Split

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MIN_SIZE = 16  # pixels; in smaller images a part spans fewer than four pixels and is unreadable

_SPACING = 0.26  # distance of neighboring elements at scale 1, in image sides
_RADIUS = 0.12  # half the extent of a part at scale 1, in image sides: 7.7 px of 32
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_LATTICE = 9  # points along a side of the background's color lattice
_CLOUD = 0.06  # largest color offset of a lattice point
_NOISE = 0.03  # standard deviation of the pixel noise
_CHUNK_PIXELS = 400 * 32 * 32  # pixels rendered at once; keeps temporary arrays below 50 MB

# -- signed distances of the parts: unit radius, x to the right, y down, negative inside -------------------------------


def _box(x: Array, y: Array, half_x: float, half_y: float) -> Array:
    distance: Array = np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)
    return distance


def _circle(x: Array, y: Array, radius: float) -> Array:
    distance: Array = np.sqrt(x * x + y * y)
    return distance - np.float32(radius)


def _plus(x: Array, y: Array, arm: float) -> Array:
    return np.minimum(_box(x, y, arm, 0.26), _box(x, y, 0.26, arm))


def _cross(x: Array, y: Array) -> Array:
    return _plus((x + y) * 0.7071, (y - x) * 0.7071, 1.1)


def _triangle(x: Array, y: Array) -> Array:
    distance: Array = np.maximum(y - 0.85, np.abs(x) * 0.874 - (y + 1) * 0.486)
    return distance


def _corner(x: Array, y: Array) -> Array:
    return np.minimum(_box(x + 0.6, y, 0.3, 0.92), _box(x, y - 0.62, 0.9, 0.3))


def _chevron(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(np.abs(x) * 0.793 - y * 0.61 - 0.38) - 0.29, np.abs(x) - 0.9)


_PART_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: _circle(x, y, 0.93),
    "ring": lambda x, y: np.abs(_circle(x, y, 0.75)) - np.float32(0.25),
    "triangle": _triangle,
    "plus": lambda x, y: _plus(x, y, 0.95),
    "cross": _cross,
    "bar": lambda x, y: _box(x, y, 0.92, 0.36),
    "pillar": lambda x, y: _box(x, y, 0.36, 0.92),
    "corner": _corner,
    "equals": lambda x, y: np.minimum(_box(x, y - 0.47, 0.92, 0.24), _box(x, y + 0.47, 0.92, 0.24)),
    "chevron": _chevron,
}

# Element centers in units of the spacing. Neighbors are about 1 apart, so that the parts of a figure never merge. A figure
# has three to six elements; with more, it would not fit into the image at a readable part size.
_ARRANGEMENTS: dict[str, tuple[tuple[float, float], ...]] = {
    "row": ((-1, 0), (0, 0), (1, 0)),
    "column": ((0, -1), (0, 0), (0, 1)),
    "diagonal": ((-0.9, -0.9), (0, 0), (0.9, 0.9)),
    "corners": ((-0.9, -0.9), (0.9, -0.9), (-0.9, 0.9), (0.9, 0.9)),
    "plus": ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)),
    "triangle": ((0, -1), (-0.55, 0), (0.55, 0), (-1.05, 1), (0, 1), (1.05, 1)),
    "ell": ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)),
    "tee": ((-1, -1), (0, -1), (1, -1), (0, 0), (0, 1)),
    "vee": ((-1.05, -1), (1.05, -1), (-0.55, 0), (0.55, 0), (0, 1)),
    "circle": ((0, -1.1), (0.95, -0.55), (0.95, 0.55), (0, 1.1), (-0.95, 0.55), (-0.95, -0.55)),
}

# Names of the classes, in label order.
PARTS: tuple[str, ...] = tuple(_PART_DISTANCES)
WHOLES: tuple[str, ...] = tuple(_ARRANGEMENTS)

_NUM_ELEMENTS = max(len(points) for points in _ARRANGEMENTS.values())


@dataclass(frozen=True)
class _Scenes:
    """The content of N images with up to E elements each, independent of the resolution.

    Lengths are in image sides with the origin at the center of the image, colors are in [0, 1], and angles in radians.
    """

    whole: Labels  # [N]
    part: Labels  # [N]
    present: Mask  # [N, E]
    center: Array  # [N, E, 2]
    radius: Array  # [N, E]
    angle: Array  # [N, E]
    color: Array  # [N, 2, 3] background and elements
    cloud: Array  # [N, 3, C, C] color offsets of the background on a lattice over the image

    def __len__(self) -> int:
        return len(self.whole)

    def take(self, index: slice | Labels) -> _Scenes:
        """Return some of the scenes."""
        return _Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


# -- sampling scenes ---------------------------------------------------------------------------------------------------


def _sample_labels(rng: np.random.Generator, count: int) -> tuple[Labels, Labels]:
    """Sample whole and part labels [N], balanced to within one image, also in pairs."""
    order = rng.permutation(count)
    # A walk through a Latin square: every run of ten contains each class of both kinds once, and every run of a hundred
    # contains each pair once. The permutation of the classes keeps an incomplete run from favoring low ones.
    whole = rng.permutation(len(WHOLES))[order % len(WHOLES)].astype(np.int64)
    part = rng.permutation(len(PARTS))[(order + order // len(WHOLES)) % len(PARTS)].astype(np.int64)
    return whole, part


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Array:
    """Sample uniform numbers."""
    return rng.uniform(low, high, shape).astype(np.float32)


def _sample_positions(rng: np.random.Generator, whole: Labels) -> tuple[Mask, Array, Array, Array]:
    """Rotate, scale, jitter and shift the arrangements; return `present`, `center`, `radius` and `angle` of the scenes."""
    count = len(whole)
    points = np.zeros((len(WHOLES), _NUM_ELEMENTS, 2), np.float32)
    exists = np.zeros((len(WHOLES), _NUM_ELEMENTS), np.bool_)
    for kind, arrangement in enumerate(_ARRANGEMENTS.values()):
        points[kind, : len(arrangement)] = arrangement
        exists[kind, : len(arrangement)] = True
    present = exists[whole]

    # Whole and part together rotate by less than 22.5 degrees, half of the angle that turns a plus into a cross.
    rotation = _uniform(rng, -np.radians(12), np.radians(12), count, 1)
    scale = _uniform(rng, 0.88, 1.08, count, 1)
    cos, sin = np.cos(rotation), np.sin(rotation)
    x, y = points[whole, :, 0], points[whole, :, 1]
    center = np.stack([cos * x - sin * y, sin * x + cos * y], -1) * (scale * _SPACING)[..., None]
    center += _uniform(rng, -0.015, 0.015, count, _NUM_ELEMENTS, 2)
    radius = scale * _RADIUS * _uniform(rng, 0.93, 1.07, count, _NUM_ELEMENTS)

    low = np.where(present[..., None], center - radius[..., None], np.inf).min(1)
    high = np.where(present[..., None], center + radius[..., None], -np.inf).max(1)
    margin = np.maximum(1 - (high - low), 0) / 2
    shift = margin * _uniform(rng, -1, 1, count, 2) - (high + low) / 2
    center += shift[:, None].astype(np.float32)
    angle = rotation + _uniform(rng, -np.radians(6), np.radians(6), count, _NUM_ELEMENTS)
    return present, center, radius, angle


def _sample_tints(rng: np.random.Generator, strength: float, *shape: int) -> Array:
    """Sample color offsets [*shape, 3] that do not change the luminance."""
    tint = _uniform(rng, -strength, strength, *shape, 3)
    return tint - (tint @ _LUMA)[..., None]


def _sample_colors(rng: np.random.Generator, count: int) -> Array:
    """Sample colors [N, 2, 3] of background and elements, at least 0.36 apart in luminance; either one is lighter."""
    # They are symmetric about mid gray, so that the mean image of a class is flat and no linear map sees the figure.
    sign = rng.choice(np.array([-1, 1], np.float32), (count, 1))
    luma = 0.5 + sign * np.array([-1, 1], np.float32) * _uniform(rng, 0.18, 0.42, count, 2)
    color: Array = np.clip(luma[..., None] + _sample_tints(rng, 0.3, count, 2), 0, 1).astype(np.float32)
    return color


def _sample_scenes(count: int, seed: int) -> _Scenes:
    """Sample scenes from the seed alone."""
    rng = np.random.default_rng([seed, 0])
    whole, part = _sample_labels(rng, count)
    cloud = _uniform(rng, -_CLOUD, _CLOUD, count, 3, _LATTICE, _LATTICE)
    return _Scenes(whole, part, *_sample_positions(rng, whole), _sample_colors(rng, count), cloud)


# -- rendering ---------------------------------------------------------------------------------------------------------


def _pixel_centers(size: int) -> Array:
    """Return the pixel centers [S] along a side, in image sides with the origin at the center."""
    return ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)


def _coverage(scenes: _Scenes, size: int) -> Array:
    """Return the fraction of every pixel that each element covers, [N, E, S, S]; 0 for absent elements."""
    axis = _pixel_centers(size)
    cover = np.zeros((len(scenes), _NUM_ELEMENTS, size, size), np.float32)
    for kind, distance in enumerate(_PART_DISTANCES.values()):
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


def _render_background(scenes: _Scenes, size: int) -> Array:
    """Render backgrounds [N, 3, S, S]: the background color plus the bilinearly interpolated lattice of color offsets."""
    position = (_pixel_centers(size) + 0.5) * (_LATTICE - 1)
    weight = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(_LATTICE))).astype(np.float32)  # [S, C]
    background: Array = scenes.color[:, 0, :, None, None] + weight @ scenes.cloud @ weight.T
    return background


def _render(scenes: _Scenes, cover: Array, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Render images [N, 3, S, S] from the coverage [N, E, S, S] of the elements."""
    image = _render_background(scenes, cover.shape[-1])
    image += cover.max(1)[:, None] * (scenes.color[:, 1, :, None, None] - image)
    image += np.float32(_NOISE) * rng.standard_normal(image.shape, np.float32)
    pixels: npt.NDArray[np.uint8] = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels


def _iter_chunks(scenes: _Scenes, size: int) -> Iterator[tuple[slice, _Scenes, Array]]:
    """Yield the scenes in chunks that bound the memory: their rows, the scenes, and the coverage of their elements."""
    chunk_size = max(1, _CHUNK_PIXELS // size**2)
    for start in range(0, len(scenes), chunk_size):
        rows = slice(start, start + chunk_size)
        chunk = scenes.take(rows)
        yield rows, chunk, _coverage(chunk, size)


def generate(count: int, size: int = 32, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Generate labeled images from a seed; the global random state is neither read nor changed.

    Args:
        count: Number of images N.
        size: Image side S in pixels, at least 16; the same seed shows the same scenes at any size.
        seed: Non-negative seed.

    Returns:
        Images, uint8 [N, 3, S, S], and labels `{"whole": int64 [N], "part": int64 [N]}`, which are indices into `WHOLES` and
        `PARTS`, balanced separately and in pairs.
    """
    if size < MIN_SIZE:
        raise UserError(
            f"dataset.image_size={size}: images of the shapes dataset must have at least {MIN_SIZE} pixels to a side."
        )
    scenes = _sample_scenes(count, seed)
    images = np.empty((count, 3, size, size), np.uint8)
    noise = np.random.default_rng([seed, 1])  # separate from the scenes, which must not depend on the size
    for rows, chunk, cover in _iter_chunks(scenes, size):
        images[rows] = _render(chunk, cover, noise)
    labels = {"whole": torch.from_numpy(scenes.whole), "part": torch.from_numpy(scenes.part)}
    return torch.from_numpy(images), labels


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
    scenes = _sample_scenes(count, seed)
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
        **common: Options of `DataModule`.
    """

    def __init__(self, train: PositiveInt, test: PositiveInt, data_seed: NonNegativeInt, **common: Any) -> None:
        super().__init__(**common)
        self.sizes, self.data_seed = {"train": train, "test": test}, data_seed

    def load(self, split: Literal["train", "test"]) -> Split:
        images, labels = generate(self.sizes[split], self.image_size, self.split_seed(split))
        return Split(images, {name: labels[name] for name in ("part", "whole")})

    def split_seed(self, split: Literal["train", "test"]) -> int:
        """Return the seed of a split."""
        return 2 * self.data_seed + (split == "test")

    def patch_parts(self, split: Literal["train", "test"], patch: int, coverage: float) -> Tensor:
        """Return the part that every patch of a split's images shows, int64 [N, num_patches], see `patch_parts`."""
        return patch_parts(self.sizes[split], self.image_size, self.split_seed(split), patch, coverage)

    def class_names(self, label: str) -> list[str]:
        return list({"part": PARTS, "whole": WHOLES}[label])
