"""The table of a sweep: what was varied, how each job ended, and the mean over seeds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hjepa.sweep.jobs import Job

RESULTS = {  # column -> dotted key of summary.json
    "linear": "probe.linear",
    "untrained": "untrained.linear",
    "knn": "probe.knn",
    "images/s": "images_per_second",
    "seconds": "seconds",
}
Groups = dict[tuple[str, ...], list[float]]


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


def options(job: Job) -> dict[str, str]:
    """What a job's overrides set: option -> value."""
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in job.overrides)}


def varied(jobs: Sequence[Job]) -> list[str]:
    """The options that differ between the jobs."""
    chosen = [options(job) for job in jobs]
    return [key for key in dict.fromkeys(k for c in chosen for k in c) if len({c.get(key) for c in chosen}) > 1]


def naming(jobs: Sequence[Job], job: Job) -> str:
    """What sets a job apart from the others, as it is typed."""
    chosen = options(job)
    return " ".join(f"{key}={chosen[key]}" for key in varied(jobs) if key in chosen)


def groups(jobs: Sequence[Job], metric: str) -> tuple[list[str], Groups]:
    """The varied options but the seed, and the metric's values of all whole runs by the values of these options."""
    axes = [key for key in varied(jobs) if key != "seed"]
    found: Groups = {}
    for job in jobs:
        value = lookup(job.summary, metric)
        if value is not None and job.state in ("finished", "collapsed"):
            chosen = options(job)
            found.setdefault(tuple(chosen.get(key, "") for key in axes), []).append(value)
    return axes, found


def spread(values: list[float]) -> float:
    """Standard deviation of a sample, 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def figure(value: float | None, key: str) -> str:
    """A result as people read it: shares of images in per cent."""
    if value is None:
        return ""
    return f"{value:.1%}" if key.endswith(("linear", "knn")) else f"{value:.4g}"


def table(jobs: Sequence[Job], metric: str, folder: Path) -> str:
    """One line per job, then one per combination of options where there are several seeds."""
    keys = varied(jobs)
    wanted = RESULTS if metric in RESULTS.values() else RESULTS | {metric: metric}
    columns = {column: key for column, key in wanted.items() if any(lookup(job.summary, key) is not None for job in jobs)}
    rows = [["job", *keys, "state", *columns, "log", ""]]
    for job in jobs:
        chosen, log = options(job), job.log
        near = "" if log is None else str(log.relative_to(folder) if log.is_relative_to(folder) else log)
        cells = [figure(lookup(job.summary, key), key) for key in columns.values()]
        reason = job.reason.splitlines()[0] if job.reason else ""
        rows.append([str(job.number), *(chosen.get(key, "") for key in keys), job.state, *cells, near, reason])
    lines = [f"Sweep {folder.name}:", *aligned(rows)]
    axes, found = groups(jobs, metric)
    if any(len(values) > 1 for values in found.values()):
        over = [["", *axes, metric, "", "runs"]]
        for chosen_values, values in found.items():
            spreads = f"+- {figure(spread(values), metric)}" if len(values) > 1 else ""
            over.append(["", *chosen_values, figure(mean(values), metric), spreads, str(len(values))])
        lines += ["", "Mean and standard deviation over seeds:", *aligned(over)]
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines with columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
