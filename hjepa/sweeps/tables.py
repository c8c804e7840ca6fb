"""The table of a sweep or a comparison: what was varied, how each run ended, the mean over seeds, and the differences between
runs of the same seed.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from hjepa.sweeps.job import Job

RESULTS = {  # column -> dotted key of summary.json
    "linear": "probe.linear",
    "untrained": "untrained.linear",
    "knn": "probe.knn",
    "rankme": "probe.rankme",
    "images/s": "images_per_second",
    "evaluated linear": "evaluate.linear",
    "evaluated knn": "evaluate.knn",
    "finetuned": "evaluate.finetune",
    "of matmul rate": "utilization",
    "seconds": "seconds",
    "memory MB": "peak_memory_mb",
}

SHARES = ("linear", "knn", "finetune", "utilization")  # ends of the keys of shares, which people read in per cent

Group = tuple[str, ...]  # values of the varied options

Groups = dict[Group, list[float]]


class Difference(NamedTuple):
    """Mean of the differences between runs of the same seed, its standard error (None for one pair), and the pairs."""

    mean: float
    error: float | None
    pairs: int


def lookup(summary: dict[str, Any], key: str) -> float | None:
    """A number of a summary by its dotted key; None where there is none."""
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def results(summary: dict[str, Any]) -> dict[str, float]:
    """The columns of `RESULTS` that a summary has."""
    return {column: value for column, key in RESULTS.items() if (value := lookup(summary, key)) is not None}


def default_metric(jobs: Sequence[Job]) -> str:
    """What jobs are compared by: the linear probe, or the speed where nothing was probed."""
    probed = any(lookup(job.summary, "probe.linear") is not None for job in jobs)
    return "probe.linear" if probed else "images_per_second"


def columns(jobs: Sequence[Job], metric: str) -> dict[str, str]:
    """The columns of results that any job has, with the keys of summary.json that they hold."""
    wanted = RESULTS if metric in RESULTS.values() else RESULTS | {metric: metric}
    return {column: key for column, key in wanted.items() if any(lookup(job.summary, key) is not None for job in jobs)}


def options(job: Job) -> dict[str, str]:
    """What a job's overrides set: option -> value."""
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in job.overrides)}


def varied(jobs: Sequence[Job]) -> list[str]:
    """The options that differ between the jobs."""
    chosen = [options(job) for job in jobs]
    return [key for key in dict.fromkeys(k for c in chosen for k in c) if len({c.get(key) for c in chosen}) > 1]


def label_of(jobs: Sequence[Job], job: Job) -> str:
    """What sets a job apart from the others, as it is typed."""
    chosen = options(job)
    return " ".join(f"{key}={chosen[key]}" for key in varied(jobs) if key in chosen)


def members(jobs: Sequence[Job]) -> tuple[list[str], dict[Group, list[Job]]]:
    """The varied options but the seed, and all whole runs by the values of these options."""
    axes = [key for key in varied(jobs) if key != "seed"]
    found: dict[Group, list[Job]] = {}
    for job in jobs:
        if job.is_complete:
            chosen = options(job)
            found.setdefault(tuple(chosen.get(key, "") for key in axes), []).append(job)
    return axes, found


def groups(jobs: Sequence[Job], metric: str) -> tuple[list[str], Groups]:
    """The varied options but the seed, and the metric's values of all whole runs by the values of these options."""
    axes, found = members(jobs)
    values = {chosen: numbers(runs, metric) for chosen, runs in found.items()}
    return axes, {chosen: found for chosen, found in values.items() if found}


def numbers(jobs: Sequence[Job], key: str) -> list[float]:
    """The values of a key of summary.json, of the jobs that have one."""
    return [value for job in jobs if (value := lookup(job.summary, key)) is not None]


def difference(before: Sequence[Job], after: Sequence[Job], key: str) -> Difference | None:
    """How a number differs between two groups of runs, pair by pair of runs with the same seed: what the seed alone does (the
    data's order, the initial weights) is the same for both. None without such a pair.
    """
    old, new = ({seed(job): value for job in jobs if (value := lookup(job.summary, key)) is not None} for jobs in (before, after))
    found = [new[number] - old[number] for number in old if number in new]
    if not found:
        return None
    return Difference(mean(found), stdev(found) / len(found) ** 0.5 if len(found) > 1 else None, len(found))


def seed(job: Job) -> str:
    """The seed of a run, as it was asked for or as the run tells."""
    return options(job).get("seed") or str(job.summary.get("seed"))


def std(values: list[float]) -> float:
    """Standard deviation of a sample, 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def figure(value: float | None, key: str) -> str:
    """A result as people read it: shares in per cent."""
    if value is None:
        return ""
    return f"{value:.1%}" if key.endswith(SHARES) else f"{value:.4g}"


def table(jobs: Sequence[Job], metric: str, title: str, folder: Path) -> str:
    """One line per job, then one per combination of options where there are several seeds, then the differences between these.

    Args:
        metric: dotted key of summary.json, which becomes a column; folder: that what jobs said, or their runs, is named from.
    """
    shown = columns(jobs, metric)
    lines = [f"{title}:", *job_lines(jobs, shown, folder)]
    axes, found = members(jobs)
    if any(len(runs) > 1 for runs in found.values()):
        over = [["", *axes, *shown, "runs"]]
        for chosen, runs in found.items():
            over.append(["", *chosen, *(average(numbers(runs, key), key) for key in shown.values()), str(len(runs))])
        lines += ["", "Mean and standard deviation over seeds:", *aligned(over)]
    return "\n".join([*lines, *paired_lines(axes, found, shown)])


def job_lines(jobs: Sequence[Job], shown: dict[str, str], folder: Path) -> list[str]:
    """One line per job: its options, its end, its results, and where to look."""
    keys, logged = varied(jobs), any(job.log for job in jobs)
    rows = [["job", *keys, "state", *shown, "log" if logged else "run", ""]]
    for job in jobs:
        chosen, place = options(job), job.log if logged else job.folder
        near = "" if place is None else str(place.relative_to(folder) if place.is_relative_to(folder) else place)
        cells = [figure(lookup(job.summary, key), key) for key in shown.values()]
        reason = job.reason.splitlines()[0] if job.reason else ""
        rows.append([str(job.number), *(chosen.get(key, "") for key in keys), job.state, *cells, near, reason])
    return aligned(rows)


def average(values: list[float], key: str) -> str:
    """Mean and standard deviation as people read them."""
    if not values:
        return ""
    deviation = f"{std(values):.1%}" if key.endswith(SHARES) else f"{std(values):.3g}"
    return figure(mean(values), key) + (f" +- {deviation}" if len(values) > 1 else "")


def paired_lines(axes: list[str], found: dict[Group, list[Job]], shown: dict[str, str]) -> list[str]:
    """How every combination of options differs from the first, where that is one comparison or there are several seeds."""
    (first, *others), one_comparison = list(found) or [()], len(found) == 2
    rows, pairs = [["", *axes, *shown, "pairs"]], 0
    for chosen in others:
        differences = {key: difference(found[first], found[chosen], key) for key in shown.values()}
        count = max((d.pairs for d in differences.values() if d), default=0)
        rows.append(["", *chosen, *(difference_cell(d, key) for key, d in differences.items()), str(count)])
        pairs = max(pairs, count)
    if not pairs or not (one_comparison or pairs > 1):
        return []
    named = ", ".join(f"{key}={value or '(none)'}" for key, value in zip(axes, first, strict=True))
    against = named if len(axes) <= 3 else f"job {found[first][0].number} and its like"
    lines = ["", f"Difference from {against}, seed by seed (mean and its standard error):", *aligned(rows)]
    if pairs == 1 and any(key.startswith("probe.") for key in shown.values()):
        lines.append("One seed proves nothing: two runs that differ in the seed alone differ as well. Sweep seed=0,1,2 of both.")
    return lines


def difference_cell(found: Difference | None, key: str) -> str:
    """A difference as people read it, that of shares in points."""
    if found is None:
        return ""
    scale, form = (100, ".1f") if key.endswith(SHARES) else (1, ".3g")
    error = "" if found.error is None else f" +- {scale * found.error:{form}}"
    return f"{scale * found.mean:+{form}}{error}" + (" points" if scale == 100 else "")


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines with columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
