"""The plot of a sweep: the metric by what was varied, every run a dot, the mean over seeds with its spread."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hjepa.look.canvas import COLORS, MARKERS, save
from hjepa.sweep.jobs import Job
from hjepa.sweep.table import Groups, groups, spread

NAMES = {"probe.linear": "linear probe accuracy", "probe.knn": "k-NN accuracy", "images_per_second": "images per second"}
Lines = dict[str, dict[str, list[float]]]  # label -> position on the axis -> values of all seeds


def plot(jobs: Sequence[Job], metric: str, title: str, path: Path) -> None:
    """The option with the most values is the axis, every combination of the others a line; probes are drawn beside the
    untrained network's.
    """
    axes, found = groups(jobs, metric)
    across, lines = split(axes, found)
    ticks = list(dict.fromkeys(tick for points in lines.values() for tick in points))
    figure, axis = plt.subplots(figsize=(min(14.0, 5.5 + 0.7 * len(ticks)), 4.2), layout="constrained")
    for number, (label, points) in enumerate(lines.items()):
        shift = 0.4 * ((number + 0.5) / len(lines) - 0.5)
        draw(axis, number, {ticks.index(tick) + shift: values for tick, values in points.items()}, label)
    if metric.startswith("probe.") and (before := groups(jobs, metric.replace("probe", "untrained"))[1]):
        untrained = mean(value for values in before.values() for value in values)
        axis.axhline(untrained, color="0.5", linestyle=":", label="untrained network")
    name = NAMES.get(metric, metric)
    axis.set_xticks(range(len(ticks)), ticks, rotation=0 if max(map(len, ticks)) < 14 else 20)
    note = "mean and standard deviation over seeds; dots are runs" if any(len(values) > 1 for values in found.values()) else ""
    axis.set(xlim=(-0.5, len(ticks) - 0.5), xlabel=f"{across}\n{note}".strip(), ylabel=name)
    axis.set_title(f"{name[0].upper()}{name[1:]} in sweep {title}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    if "accuracy" in name:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def split(axes: list[str], found: Groups) -> tuple[str, Lines]:
    """The option on the axis, and the lines of all combinations of the others."""
    if not axes:
        return "", {"": {"all runs": [value for values in found.values() for value in values]}}
    across = max(range(len(axes)), key=lambda i: len({chosen[i] for chosen in found}))
    lines: Lines = {}
    for chosen, values in found.items():
        label = ", ".join(f"{key}={value}" for key, value in zip(axes, chosen, strict=True) if key != axes[across])
        lines.setdefault(label, {})[chosen[across]] = values
    return axes[across], lines


def draw(axis: Axes, number: int, points: dict[float, list[float]], label: str) -> None:
    """One line: a small dot per run, and where a point has several, their mean and standard deviation."""
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    several = any(len(values) > 1 for values in points.values())
    if several:
        for place, values in points.items():
            axis.plot([place + 0.06] * len(values), values, ".", color=color, alpha=0.6, markersize=5)
    means, spreads = [mean(values) for values in points.values()], [spread(values) for values in points.values()]
    axis.errorbar(
        list(points),
        means,
        spreads,
        color=color,
        marker=marker,
        linestyle="-" if label else "none",
        capsize=3,
        label=label or None,
    )
