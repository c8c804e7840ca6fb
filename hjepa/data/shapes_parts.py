"""Signed distances of the shapes that are the parts of the dataset `shapes`.

Coordinates have a unit radius, x to the right and y down; a distance is negative inside of a shape.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


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


PART_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
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
