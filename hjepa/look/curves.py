"""The curves of a run, from the records of its metrics.jsonl."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hjepa.look.canvas import COLORS, save

Record = dict[str, Any]
PANELS = {
    "prediction loss": ("train/prediction", "validation/loss", "validation/constant_loss"),
    "probe accuracy": ("probe/linear", "probe/knn"),
    "variation across images": ("teacher/variation", "student/variation"),
    "effective rank": ("probe/rankme", "teacher/rank", "student/rank"),
}


def plot_curves(records: list[Record], path: Path) -> None:
    """Losses, probes beside the untrained network, and the collapse watch over optimizer steps."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for axis, (title, keys) in zip(axes, PANELS.items(), strict=True):
        for color, key in zip(COLORS, keys, strict=False):
            draw(axis, key, [(r["step"], r[key]) for r in records if key in r], color)
        axis.set(title=title, xlabel="optimizer step")
        if "accuracy" in title:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        if axis.lines:
            axis.legend(fontsize=7)
    save(figure, path)


def draw(axis: Axes, key: str, points: list[tuple[int, float]], color: str) -> None:
    """One metric; a probe beside what it was at the start."""
    if not points:
        return
    axis.plot(*zip(*points, strict=True), color=color, marker="." if len(points) < 30 else None, label=key)
    if key.startswith("probe/"):
        axis.axhline(points[0][1], color=color, linestyle=":", label=f"untrained {key.removeprefix('probe/')}")
