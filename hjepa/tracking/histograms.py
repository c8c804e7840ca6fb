"""Histograms of the weights and gradients of a model, as files in the run folder that trackers copy."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hjepa.tracking.atomic import atomic_files

BINS = 64


class Histogram(NamedTuple):
    """How often values fall between edges.

    Attributes:
        counts: Number of values, int64 [B].
        edges: Edges of the B bins in ascending order, float64 [B + 1].
    """

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]


def count_values(values: NDArray[np.float32]) -> Histogram:
    """Return the histogram of the finite ones of any number of values."""
    counts, edges = np.histogram(values[np.isfinite(values)], BINS)
    return Histogram(counts.astype(np.int64), edges.astype(np.float64))


def histogram_files(folder: Path) -> list[Path]:
    """Return the files of histograms of a run folder in the order of their steps."""
    return sorted((folder / "histograms").glob("*.npz"))


def write_histograms(folder: Path, step: int, histograms: dict[str, Histogram]) -> Path:
    """Write the histograms of a training step, by names such as `gradients/student.norm.weight`, to a run folder."""
    file = folder / "histograms" / f"{step:08d}.npz"
    file.parent.mkdir(exist_ok=True)
    arrays: dict[str, Any] = {name: np.concatenate(histogram) for name, histogram in histograms.items()}
    with atomic_files(file) as (temporary,), temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    return file


def read_histograms(file: Path) -> tuple[int, Iterable[tuple[str, Histogram]]]:
    """Return the training step of a file, and its histograms by name."""
    with np.load(file) as arrays:
        both = {name: arrays[name] for name in arrays.files}
    return int(file.stem), [(name, Histogram(a[:BINS].astype(np.int64), a[BINS:])) for name, a in both.items()]
