"""The plot of a sweep or a comparison: results by what was varied, every run a dot, the mean over seeds with its spread."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hjepa.plotting import COLORS, MARKERS, save
from hjepa.sweeps.job import Job
from hjepa.sweeps.tables import SHARES, Group, Groups, groups, members, std
from hjepa.tracking.run_folder import read_records

NAMES = {
    "probe.linear": "Linear probe accuracy",
    "probe.knn": "k-NN accuracy",
    "probe.rankme": "RankMe (effective rank)",
    "images_per_second": "Images per second",
    "utilization": "Share of the machine's matmul rate",
    "peak_memory_mb": "Peak memory in MB",
}

PROBED = ("probe.linear", "probe.knn", "probe.rankme", "images_per_second")

TIMED = ("images_per_second", "utilization", "peak_memory_mb")

READABLE = 3  # varied options that fit axis and legend

Lines = dict[str, dict[str, list[float]]]  # label -> position on the axis -> values of all seeds


def plot(jobs: Sequence[Job], metric: str, title: str, path: Path) -> None:
    """The metric, and what else is worth a look, each in a panel.

    The option with the most values is the axis, every combination of the others a line; probes are drawn beside the untrained
    network's.
    """
    several = TIMED if metric == "images_per_second" else PROBED
    metrics = [key for key in dict.fromkeys([metric, *several]) if groups(jobs, key)[1]]
    rows = 1 if len(metrics) < 4 else 2
    width = min(9.0, 4.2 + 0.5 * len(members(jobs)[1]))
    across = -(-len(metrics) // rows)
    figure, axes = plt.subplots(rows, across, figsize=(width * across, 4.0 * rows), layout="constrained", squeeze=False)
    for axis, key in zip(axes.flat, metrics, strict=False):
        panel(axis, jobs, key)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    repeated = any(len(runs) > 1 for runs in members(jobs)[1].values())
    note = "mean and standard deviation over seeds; dots are runs" if repeated else "one run each"
    figure.suptitle(f"{title}\n{note}", fontsize=10)
    labels = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if labels:
        fit = max(1, int(13 * width * across / (max(map(len, labels)) + 8)))  # columns
        figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=fit, fontsize=8)
    save(figure, path)


def panel(axis: Axes, jobs: Sequence[Job], metric: str) -> None:
    """One metric by what was varied."""
    axes, found = groups(jobs, metric)
    across, lines = split(axes, found) if len(axes) <= READABLE else by_number(jobs, found)
    ticks = list(dict.fromkeys(tick for points in lines.values() for tick in points))
    for number, (label, points) in enumerate(lines.items()):
        shift = 0.4 * ((number + 0.5) / len(lines) - 0.5)
        draw(axis, number, {ticks.index(tick) + shift: values for tick, values in points.items()}, label)
    before = groups(jobs, metric.replace("probe", "untrained"))[1] if metric.startswith("probe.") else {}
    if before:
        untrained = mean(value for values in before.values() for value in values)
        axis.axhline(untrained, color="0.5", linestyle=":", label="untrained network")
    name = NAMES.get(metric, metric)
    long = max(map(len, ticks)) * len(ticks) > 40
    axis.set_xticks(range(len(ticks)), [tick or "(none)" for tick in ticks], rotation=20 if long else 0)
    axis.set(xlim=(-0.5, len(ticks) - 0.5), xlabel=across)
    axis.set_title(name, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    if metric.endswith(SHARES):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))


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


def by_number(jobs: Sequence[Job], found: Groups) -> tuple[str, Lines]:
    """Every combination of options by the numbers of its runs, where there are too many options to name."""
    runs = members(jobs)[1]
    return "number in the table", {"": {", ".join(str(j.number) for j in runs[c]): values for c, values in found.items()}}


def draw(axis: Axes, number: int, points: dict[float, list[float]], label: str) -> None:
    """One line: a small dot per run, and where a point has several, their mean and standard deviation."""
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    several = any(len(values) > 1 for values in points.values())
    if several:
        for place, values in points.items():
            axis.plot([place + 0.06] * len(values), values, ".", color=color, alpha=0.6, markersize=5)
    means, spreads = [mean(values) for values in points.values()], [std(values) for values in points.values()]
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


ProbeCurve = list[tuple[float, float]]  # seconds of training, accuracy


def plot_progress(jobs: Sequence[Job], title: str, path: Path) -> list[Path]:
    """A panel for each probe, a line for each run, a color for each combination of options; seeds share theirs.

    Returns:
        The picture; none where no run was probed at more than one time.
    """
    axes, found = members(jobs)
    panels = {key: courses(axes, found, key) for key in ("probe.linear", "probe.knn")}
    panels = {key: lines for key, lines in panels.items() if any(lines.values())}
    if not panels:
        return []
    figure, drawn = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axis, (key, lines) in zip(drawn.flat, panels.items(), strict=True):
        for (label, runs), color, marker in zip(lines.items(), cycle(COLORS), cycle(MARKERS), strict=False):
            for number, course in enumerate(runs):
                axis.plot(*zip(*course, strict=True), color=color, marker=marker, markersize=4, label=None if number else label)
        axis.set_title(NAMES[key], fontsize=10)
        axis.set_xlabel("seconds of training, without probes")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
    handles, labels = drawn.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=max(1, 110 // (max(map(len, labels)) + 8)))
    figure.suptitle(f"{title}: accuracy over time\na line is a run, from the untrained network on", fontsize=10)
    save(figure, path)
    return [path]


def courses(axes: Sequence[str], found: dict[Group, list[Job]], key: str) -> dict[str, list[ProbeCurve]]:
    """How a probe went in every run that was probed at more than one time, by what tells the runs from others."""
    lines = {}
    for chosen, runs in found.items():
        every = [course(job.folder, key.replace(".", "/")) for job in runs if job.folder]
        lines[line_label(axes, chosen, runs)] = [one for one in every if len(one) > 1]
    return lines


def line_label(axes: Sequence[str], chosen: Group, runs: Sequence[Job]) -> str:
    """The varied options; where there are too many to name, the runs' numbers in the table, and what the first is called."""
    if len(axes) <= READABLE:
        return ", ".join(f"{name}={value}" for name, value in zip(axes, chosen, strict=True) if value) or "all runs"
    numbers, folder = ", ".join(str(job.number) for job in runs), runs[0].folder
    return f"{numbers} in the table: {folder.name if folder else ''}{' and other seeds' if len(runs) > 1 else ''}"


def course(folder: Path, key: str) -> ProbeCurve:
    """A metric of a run folder over its seconds of training."""
    return [(record["seconds"], record[key]) for record in read_records(folder) if key in record and "seconds" in record]
