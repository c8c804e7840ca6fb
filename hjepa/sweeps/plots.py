"""Plots of a sweep or a comparison: final results over the varied options, and probe accuracy over the time of training."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hjepa.plotting import COLORS, MARKERS, save_figure
from hjepa.sweeps.job import Job
from hjepa.sweeps.tables import PERCENT_SUFFIXES, Comparison, Group
from hjepa.tracking.run_folder import read_records

METRIC_NAMES = {
    "probe.linear": "Linear probe accuracy",
    "probe.knn": "k-NN accuracy",
    "probe.rankme": "RankMe (effective rank)",
    "images_per_second": "Images per second",
    "utilization": "Fraction of the machine's matmul rate",
    "peak_memory_mb": "Peak memory in MB",
}

TRAINING_METRICS = ("probe.linear", "probe.knn", "probe.rankme", "images_per_second")

BENCHMARK_METRICS = ("images_per_second", "utilization", "peak_memory_mb")

MAX_LABELED_OPTIONS = 3  # more varied options than these fit neither axis labels nor the legend

Lines = dict[str, dict[str, list[float]]]  # label of a line -> tick on the axis -> results of all seeds

ProbeCurve = list[tuple[float, float]]  # seconds of training, accuracy


def save_plots(comparison: Comparison, title: str, path: Path) -> list[Path]:
    """Plot the results to a file and, if the runs were probed, their progress beside it; print and return the paths."""
    plot_results(comparison, title, path)
    files = [path, *plot_progress(comparison, title, path.with_name("progress.png"))]
    print(f"Plots: {', '.join(map(str, files))}")
    return files


def plot_results(comparison: Comparison, title: str, path: Path) -> None:
    """Plot the metric of a comparison and other metrics of interest, each in a panel.

    The option with the most values is the horizontal axis, and every combination of the other options is a line. The result of
    the network with random weights is drawn beside that of a probe.
    """
    several = BENCHMARK_METRICS if comparison.metric == "images_per_second" else TRAINING_METRICS
    metrics = [key for key in dict.fromkeys([comparison.metric, *several]) if comparison.values(key)]
    num_rows = 1 if len(metrics) < 4 else 2
    num_columns = -(-len(metrics) // num_rows)
    width = min(9.0, 4.2 + 0.5 * len(comparison.groups))
    size = (width * num_columns, 4.0 * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for axis, key in zip(axes.flat, metrics, strict=False):
        plot_metric(axis, comparison, key)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    note = "mean and standard deviation over seeds; dots are runs" if comparison.has_repeats else "one run each"
    figure.suptitle(f"{title}\n{note}", fontsize=10)
    labels = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if labels:
        legend_columns = max(1, int(13 * width * num_columns / (max(map(len, labels)) + 8)))
        figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=legend_columns, fontsize=8)
    save_figure(figure, path)


def plot_metric(axis: Axes, comparison: Comparison, key: str) -> None:
    """Plot one metric over the varied options."""
    few = len(comparison.options) <= MAX_LABELED_OPTIONS
    option, lines = lines_by_option(comparison, key) if few else line_by_number(comparison, key)
    ticks = list(dict.fromkeys(tick for points in lines.values() for tick in points))
    for number, (label, points) in enumerate(lines.items()):
        shift = 0.4 * ((number + 0.5) / len(lines) - 0.5)
        plot_line(axis, number, {ticks.index(tick) + shift: values for tick, values in points.items()}, label)
    untrained = comparison.values(key.replace("probe", "untrained")) if key.startswith("probe.") else {}
    if untrained:
        level = mean(value for values in untrained.values() for value in values)
        axis.axhline(level, color="0.5", linestyle=":", label="random weights")
    rotate = max(map(len, ticks)) * len(ticks) > 40
    axis.set_xticks(range(len(ticks)), [tick or "(none)" for tick in ticks], rotation=20 if rotate else 0)
    axis.set(xlim=(-0.5, len(ticks) - 0.5), xlabel=option)
    axis.set_title(METRIC_NAMES.get(key, key), fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    if key.endswith(PERCENT_SUFFIXES):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def lines_by_option(comparison: Comparison, key: str) -> tuple[str, Lines]:
    """Return the option of the horizontal axis, and a line for each combination of the other options."""
    options, results = comparison.options, comparison.values(key)
    if not options:
        return "", {"": {"all runs": [value for values in results.values() for value in values]}}
    axis = max(range(len(options)), key=lambda i: len({group[i] for group in results}))
    lines: Lines = {}
    for group, values in results.items():
        label = ", ".join(f"{key}={value}" for key, value in zip(options, group, strict=True) if key != options[axis])
        lines.setdefault(label, {})[group[axis]] = values
    return options[axis], lines


def line_by_number(comparison: Comparison, key: str) -> tuple[str, Lines]:
    """Return one line over the numbers of the runs, for more options than can be labeled."""
    numbers = {group: ", ".join(str(job.number) for job in jobs) for group, jobs in comparison.groups.items()}
    return "number in the table", {"": {numbers[group]: values for group, values in comparison.values(key).items()}}


def plot_line(axis: Axes, number: int, points: dict[float, list[float]], label: str) -> None:
    """Plot the mean and standard deviation at every position, and a dot per run if any position has several."""
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    if any(len(values) > 1 for values in points.values()):
        for position, values in points.items():
            axis.plot([position + 0.06] * len(values), values, ".", color=color, alpha=0.6, markersize=5)
    axis.errorbar(
        list(points),
        [mean(values) for values in points.values()],
        [stdev(values) if len(values) > 1 else 0.0 for values in points.values()],
        color=color,
        marker=marker,
        linestyle="-" if label else "none",
        capsize=3,
        label=label or None,
    )


def plot_progress(comparison: Comparison, title: str, path: Path) -> list[Path]:
    """Plot every probe in a panel and every run as a line; runs that differ only in the seed share a color.

    Returns:
        The path of the picture, or nothing if no run was probed more than once.
    """
    panels = {key: curves_by_label(comparison, key) for key in ("probe.linear", "probe.knn")}
    panels = {key: lines for key, lines in panels.items() if any(lines.values())}
    if not panels:
        return []
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axis, (key, lines) in zip(axes.flat, panels.items(), strict=True):
        for (label, curves), color, marker in zip(lines.items(), cycle(COLORS), cycle(MARKERS), strict=False):
            for number, curve in enumerate(curves):
                axis.plot(*zip(*curve, strict=True), color=color, marker=marker, markersize=4, label=None if number else label)
        axis.set_title(METRIC_NAMES[key], fontsize=10)
        axis.set_xlabel("seconds of training, without probes")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=max(1, 110 // (max(map(len, labels)) + 8)))
    figure.suptitle(f"{title}: accuracy over time\none line per run, from before the training on", fontsize=10)
    save_figure(figure, path)
    return [path]


def curves_by_label(comparison: Comparison, key: str) -> dict[str, list[ProbeCurve]]:
    """Return the curves of all runs that were probed more than once, by the label of their group."""
    lines = {}
    for group, jobs in comparison.groups.items():
        curves = [probe_curve(job.folder, key.replace(".", "/")) for job in jobs if job.folder]
        lines[line_label(comparison.options, group, jobs)] = [curve for curve in curves if len(curve) > 1]
    return lines


def line_label(options: Sequence[str], group: Group, jobs: Sequence[Job]) -> str:
    """Return the values of the varied options or, if they are too many, the numbers of the runs and the name of the first."""
    if len(options) <= MAX_LABELED_OPTIONS:
        return ", ".join(f"{name}={value}" for name, value in zip(options, group, strict=False) if value) or "all runs"
    numbers, folder = ", ".join(str(job.number) for job in jobs), jobs[0].folder
    return f"{numbers} in the table: {folder.name if folder else ''}{' and other seeds' if len(jobs) > 1 else ''}"


def probe_curve(folder: Path, key: str) -> ProbeCurve:
    """Return a metric of a run folder over its seconds of training."""
    return [(record["seconds"], record[key]) for record in read_records(folder) if key in record and "seconds" in record]
