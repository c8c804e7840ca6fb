"""The facts of a sweep's report, gathered from the sweep folder and the run folders of its jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hjepa.sweeps.job import Job
from hjepa.sweeps.plots import METRIC_NAMES
from hjepa.sweeps.tables import Comparison, default_metric, format_value, label_of, lookup
from hjepa.tasks.report.html import Picture, Table
from hjepa.training.summary import gains

CURVES = "curves.png"


def sweep_facts(folder: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the facts that the template of a sweep's page shows."""
    metric = default_metric(jobs)
    comparison = Comparison(jobs, metric)
    scored = [job for job in jobs if job.is_complete and lookup(job.summary, metric) is not None]
    best = max(scored, key=lambda job: lookup(job.summary, metric) or 0.0, default=None)
    return {
        "title": f"Sweep {folder.name}",
        "folder": str(folder),
        "count": len(jobs),
        "unfinished": [(job.number, job.state, job.reason) for job in jobs if not job.is_complete],
        "best": best and {"name": label_of(jobs, best) or f"job {best.number}", "gains": gains(best.summary)},
        "metric": METRIC_NAMES.get(metric, metric),
        "score": best and format_value(lookup(best.summary, metric), metric),
        "plot": [Picture(file) for file in (folder / "sweep.png", folder / "progress.png") if file.exists()],
        "jobs": Table.from_frame("Jobs", comparison.job_table()),
        "means": Table.from_frame("Mean +- standard deviation over seeds", comparison.mean_table())
        if comparison.has_repeats
        else None,
        "curves": [(job.number, label_of(jobs, job), Picture(file)) for job, file in curves(jobs)],
        "runs": [(job.number, str(job.folder)) for job in jobs if job.folder],
    }


def curves(jobs: Sequence[Job]) -> list[tuple[Job, Path]]:
    """Return the jobs whose runs have training curves, with the picture of the curves."""
    files = ((job, job.folder / "plots" / CURVES) for job in jobs if job.folder)
    return [(job, file) for job, file in files if file.exists()]
