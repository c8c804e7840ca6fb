"""What a report says of a sweep, gathered from its folder and its runs'."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hjepa.sweeps.job import Job
from hjepa.sweeps.plots import NAMES
from hjepa.sweeps.tables import RESULTS, default_metric, figure, groups, label_of, lookup, options, std, varied
from hjepa.tasks.report.html import Picture, Table
from hjepa.training.summary import gains

CURVES = "curves.png"


def sweep_facts(folder: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """The facts of a sweep's page."""
    metric = default_metric(jobs)
    scored = [job for job in jobs if job.is_complete and lookup(job.summary, metric) is not None]
    best = max(scored, key=lambda job: lookup(job.summary, metric) or 0.0, default=None)
    unfinished = [job for job in jobs if not job.is_complete]
    return {
        "title": f"Sweep {folder.name}",
        "folder": str(folder),
        "count": len(jobs),
        "unfinished": [(job.number, job.state, job.reason) for job in unfinished],
        "best": best and {"name": label_of(jobs, best) or f"job {best.number}", "gains": gains(best.summary)},
        "metric": NAMES.get(metric, metric),
        "score": best and figure(lookup(best.summary, metric), metric),
        "plot": [Picture(file) for file in (folder / "sweep.png", folder / "progress.png") if file.exists()],
        "jobs": job_table(jobs),
        "means": mean_table(jobs, metric),
        "curves": [(job.number, label_of(jobs, job), Picture(file)) for job, file in curves(jobs)],
        "runs": [(job.number, str(job.folder)) for job in jobs if job.folder],
    }


def job_table(jobs: Sequence[Job]) -> Table:
    """A row per job: what was varied, how it ended, its results."""
    keys = varied(jobs)
    shown = {name: key for name, key in RESULTS.items() if any(lookup(job.summary, key) is not None for job in jobs)}
    rows = [
        [
            str(job.number),
            *(options(job).get(key, "") for key in keys),
            job.state,
            *(figure(lookup(job.summary, key), key) for key in shown.values()),
        ]
        for job in jobs
    ]
    return Table("Jobs", ["job", *keys, "state", *shown], rows)


def mean_table(jobs: Sequence[Job], metric: str) -> Table | None:
    """Mean and standard deviation over seeds, where any combination of options has several."""
    axes, found = groups(jobs, metric)
    if all(len(values) < 2 for values in found.values()):
        return None
    rows = [
        [*chosen, figure(mean(values), metric), figure(std(values), metric) if len(values) > 1 else "", str(len(values))]
        for chosen, values in found.items()
    ]
    return Table("Mean over seeds", [*axes, metric, "standard deviation", "runs"], rows)


def curves(jobs: Sequence[Job]) -> list[tuple[Job, Path]]:
    """The curves of all runs that have some."""
    files = ((job, job.folder / "plots" / CURVES) for job in jobs if job.folder)
    return [(job, file) for job, file in files if file.exists()]
