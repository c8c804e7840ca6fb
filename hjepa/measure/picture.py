"""The picture of a benchmark: where the time of a step goes."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from hjepa.look.canvas import COLORS, save


def plot_phases(summary: dict[str, Any], path: Path) -> None:
    """A bar per phase of the step, in the order of the data flow.

    Args:
        summary: see `hjepa.measure.benchmark.summarise`.
    """
    phases, total = summary["phase_seconds"], summary["step_seconds"]
    figure, axis = plt.subplots(figsize=(7.0, 0.9 + 0.32 * len(phases)), layout="constrained")
    bars = axis.barh(list(phases), [1000 * seconds for seconds in phases.values()], color=COLORS[0])
    axis.bar_label(bars, [f"{1000 * s:.1f} ms, {s / total:.1%}" for s in phases.values()], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_xlabel("ms of a step")
    axis.set_title(
        f"{summary['device']}, batches of {summary['batch_size']}\n{summary['images_per_second']:.1f} images/s, "
        f"{summary['utilisation']:.0%} of the matmul rate, bound by {summary['bound']}",
        fontsize=9,
    )
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
