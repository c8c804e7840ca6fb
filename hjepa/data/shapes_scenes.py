"""The scenes of the dataset `shapes`: what its images show, in units of the image side, sampled from a seed.

The fades have a random generator of their own. Everything else is therefore the same for a seed as it would be without them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hjepa.data.shapes_parts import PART_DISTANCES, Array

Labels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_SPACING = 0.26  # distance of neighboring elements at scale 1, in image sides
_RADIUS = 0.12  # half the extent of a part at scale 1, in image sides: 7.7 px of 32
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
LATTICE = 9  # points along a side of the background's color lattice
_CLOUD = 0.06  # largest color offset of a lattice point

# Element centers in units of the spacing. Neighbors are about 1 apart, so that the parts of a figure never merge. A figure
# has three to six elements; with more, it would not fit into the image at a readable part size.
ARRANGEMENTS: dict[str, tuple[tuple[float, float], ...]] = {
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
PARTS: tuple[str, ...] = tuple(PART_DISTANCES)
WHOLES: tuple[str, ...] = tuple(ARRANGEMENTS)
FADES: tuple[str, ...] = ("up", "down", "sideways", "inward", "outward", "around")

NUM_ELEMENTS = max(len(points) for points in ARRANGEMENTS.values())


def _arrangement_points() -> tuple[Array, Mask]:
    """Return the element centers [W, E, 2] of every arrangement in units of the spacing, and which elements it has [W, E]."""
    points = np.zeros((len(WHOLES), NUM_ELEMENTS, 2), np.float32)
    exists = np.zeros((len(WHOLES), NUM_ELEMENTS), np.bool_)
    for kind, arrangement in enumerate(ARRANGEMENTS.values()):
        points[kind, : len(arrangement)] = arrangement
        exists[kind, : len(arrangement)] = True
    return points, exists


_POINTS, _EXISTS = _arrangement_points()


@dataclass(frozen=True)
class Scenes:
    """The content of N images with up to E elements each, independent of the resolution.

    Lengths are in image sides with the origin at the center of the image, colors are in [0, 1], and angles in radians.
    """

    whole: Labels  # [N]
    part: Labels  # [N]
    fade: Labels  # [N]
    present: Mask  # [N, E]
    center: Array  # [N, E, 2]
    radius: Array  # [N, E]
    angle: Array  # [N, E]
    fade_angle: Array  # [N, E] direction in which an element fades, 0 to the right and positive downwards
    color: Array  # [N, 2, 3] background and elements
    cloud: Array  # [N, 3, C, C] color offsets of the background on a lattice over the image

    def __len__(self) -> int:
        return len(self.whole)

    def take(self, index: slice | Labels) -> Scenes:
        """Return some of the scenes."""
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def _sample_labels(rng: np.random.Generator, fade_rng: np.random.Generator, count: int) -> tuple[Labels, Labels, Labels]:
    """Sample labels of wholes, parts and fades [N], balanced to within two images, also in combinations."""
    order = rng.permutation(count)
    # A walk through a Latin square: every run of ten contains each class of whole and part once, every run of a hundred each
    # pair of them once, and every run of six hundred each combination of all three once. The permutation of the classes keeps
    # an incomplete run from favoring low ones.
    whole = rng.permutation(len(WHOLES))[order % len(WHOLES)].astype(np.int64)
    part = rng.permutation(len(PARTS))[(order + order // len(WHOLES)) % len(PARTS)].astype(np.int64)
    pairs = len(WHOLES) * len(PARTS)
    fade = fade_rng.permutation(len(FADES))[(order + order // pairs) % len(FADES)].astype(np.int64)
    return whole, part, fade


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Array:
    """Sample uniform numbers."""
    return rng.uniform(low, high, shape).astype(np.float32)


def _sample_positions(rng: np.random.Generator, whole: Labels) -> tuple[Mask, Array, Array, Array]:
    """Rotate, scale, jitter and shift the arrangements; return `present`, `center`, `radius` and `angle` of the scenes."""
    count = len(whole)
    present = _EXISTS[whole]

    # Whole and part together rotate by less than 22.5 degrees, half of the angle that turns a plus into a cross.
    rotation = _uniform(rng, -np.radians(12), np.radians(12), count, 1)
    scale = _uniform(rng, 0.88, 1.08, count, 1)
    cos, sin = np.cos(rotation), np.sin(rotation)
    x, y = _POINTS[whole, :, 0], _POINTS[whole, :, 1]
    center = np.stack([cos * x - sin * y, sin * x + cos * y], -1) * (scale * _SPACING)[..., None]
    center += _uniform(rng, -0.015, 0.015, count, NUM_ELEMENTS, 2)
    radius = scale * _RADIUS * _uniform(rng, 0.93, 1.07, count, NUM_ELEMENTS)

    low = np.where(present[..., None], center - radius[..., None], np.inf).min(1)
    high = np.where(present[..., None], center + radius[..., None], -np.inf).max(1)
    margin = np.maximum(1 - (high - low), 0) / 2
    shift = margin * _uniform(rng, -1, 1, count, 2) - (high + low) / 2
    center += shift[:, None].astype(np.float32)
    angle = rotation + _uniform(rng, -np.radians(6), np.radians(6), count, NUM_ELEMENTS)
    return present, center, radius, angle


def _sample_fade_angles(rng: np.random.Generator, whole: Labels, fade: Labels) -> Array:
    """Sample the direction [N, E] in which every element fades, before the figure is rotated."""
    count = len(whole)
    x, y = _POINTS[whole, :, 0], _POINTS[whole, :, 1]
    outward = np.arctan2(y, x)
    # Left and right, and clockwise and counterclockwise, are one class each, so that no mirror image is another class.
    sign = rng.choice(np.array([-1, 1], np.float32), (count, 1))
    up, side = np.full_like(outward, -np.pi / 2), np.broadcast_to(np.pi / 2 * (1 - sign), outward.shape)
    by_class = {
        "up": up,
        "down": -up,
        "sideways": side,
        "inward": outward + np.pi,
        "outward": outward,
        "around": outward + np.pi / 2 * sign,
    }
    angle = np.stack([by_class[name] for name in FADES])[fade, np.arange(count)]
    # An element in the middle of a figure has no outward direction; it takes any.
    radial = np.isin(fade, [FADES.index(name) for name in ("inward", "outward", "around")])
    undirected = (x == 0) & (y == 0) & radial[:, None]
    return np.where(undirected, _uniform(rng, -np.pi, np.pi, count, NUM_ELEMENTS), angle).astype(np.float32)


def _sample_tints(rng: np.random.Generator, strength: float, *shape: int) -> Array:
    """Sample color offsets [*shape, 3] that do not change the luminance."""
    tint = _uniform(rng, -strength, strength, *shape, 3)
    return tint - (tint @ LUMA)[..., None]


def _sample_colors(rng: np.random.Generator, count: int) -> Array:
    """Sample colors [N, 2, 3] of background and elements, at least 0.36 apart in luminance; either one is lighter."""
    # They are symmetric about mid gray, so that the mean image of a class is flat and no linear map sees the figure.
    sign = rng.choice(np.array([-1, 1], np.float32), (count, 1))
    luma = 0.5 + sign * np.array([-1, 1], np.float32) * _uniform(rng, 0.18, 0.42, count, 2)
    color: Array = np.clip(luma[..., None] + _sample_tints(rng, 0.3, count, 2), 0, 1).astype(np.float32)
    return color


def sample_scenes(count: int, seed: int) -> Scenes:
    """Sample scenes from the seed alone."""
    rng, fade_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 2])
    whole, part, fade = _sample_labels(rng, fade_rng, count)
    cloud = _uniform(rng, -_CLOUD, _CLOUD, count, 3, LATTICE, LATTICE)
    present, center, radius, angle = _sample_positions(rng, whole)
    fade_angle = angle + _sample_fade_angles(fade_rng, whole, fade)
    color = _sample_colors(rng, count)
    return Scenes(whole, part, fade, present, center, radius, angle, fade_angle, color, cloud)
