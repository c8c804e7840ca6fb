"""Probe accuracy of runs against the time they have trained: which is ahead at any budget."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from hjepa.folder import read_records
from hjepa.look.canvas import COLORS, MARKERS, save
from hjepa.sweep.jobs import Job
from hjepa.sweep.plot import NAMES, READABLE
from hjepa.sweep.table import Group, members

Course = list[tuple[float, float]]  # seconds of training, accuracy


def plot_progress(jobs: Sequence[Job], title: str, path: Path) -> list[Path]:
    """A panel for each probe, a line for each run, a colour for each combination of options; seeds share theirs.

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


def courses(axes: Sequence[str], found: dict[Group, list[Job]], key: str) -> dict[str, list[Course]]:
    """How a probe went in every run that was probed at more than one time, by what tells the runs from others."""
    lines = {}
    for chosen, runs in found.items():
        every = [course(job.folder, key.replace(".", "/")) for job in runs if job.folder]
        lines[label(axes, chosen, runs)] = [one for one in every if len(one) > 1]
    return lines


def label(axes: Sequence[str], chosen: Group, runs: Sequence[Job]) -> str:
    """The varied options; where there are too many to name, the runs' numbers in the table, and what the first is called."""
    if len(axes) <= READABLE:
        return ", ".join(f"{name}={value}" for name, value in zip(axes, chosen, strict=True) if value) or "all runs"
    numbers, folder = ", ".join(str(job.number) for job in runs), runs[0].folder
    return f"{numbers} in the table: {folder.name if folder else ''}{' and other seeds' if len(runs) > 1 else ''}"


def course(folder: Path, key: str) -> Course:
    """A metric of a run folder over its seconds of training."""
    return [(record["seconds"], record[key]) for record in read_records(folder) if key in record and "seconds" in record]
