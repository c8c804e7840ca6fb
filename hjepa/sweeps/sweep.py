"""A sweep: its jobs, planned before anything starts, and what is known of them in the sweep folder.

A launcher plans the jobs, runs them wherever it does, calls `write` whenever a job's state changes, and `end` at last. All
results come from the run folders, so the table and the plot can be made anew at any time (`task=sweep`).

    sweep.json   the jobs, their states and results        table.txt, sweep.png, progress.png   for people
    N.log        what job N said
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hjepa.config.errors import UserError
from hjepa.config.identity import flatten
from hjepa.sweeps.job import Job
from hjepa.sweeps.tables import default_metric, groups, lookup, results, table
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.provenance import SWEEP
from hjepa.tracking.run_folder import check_writable, read_config, read_summary
from hjepa.tracking.tracker import Artifacts, build_trackers

KEPT = ("number", "overrides", "folder", "log", "state", "reason", "slurm_id")


class Sweep:
    """The folder of a sweep.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "sweep.json"

    def write(self, jobs: list[Job]) -> None:
        """Write sweep.json whole or not at all."""
        rows = [{key: getattr(job, key) for key in KEPT} | {"results": results(job.summary)} for job in jobs]
        atomic_write(self.file, json.dumps({"sweep": self.folder.name, "jobs": rows}, indent=2, default=str) + "\n")

    def read(self) -> list[Job]:
        """The jobs as they were written."""
        if not self.file.exists():
            raise UserError(f"{self.folder} is no sweep folder: it has no sweep.json; give one of those that sweeps name.")
        jobs = [Job(**{key: row[key] for key in KEPT}) for row in json.loads(self.file.read_text())["jobs"]]
        for job in jobs:
            job.folder, job.log = (Path(path) if path else None for path in (job.folder, job.log))
        return jobs

    def refresh(self, jobs: list[Job]) -> None:
        """Learn states and results from the run folders; a failure stays one until its run is continued."""
        for job in jobs:
            file = job.folder / "summary.json" if job.folder else None
            if not file or not file.exists():
                continue
            summary = read_summary(file.parent)
            if job.state == "FAILED" and file.stat().st_mtime <= self.file.stat().st_mtime:
                continue
            job.update_from_summary(summary)

    def end(self, jobs: list[Job], metric: str | None = None) -> None:
        """Print the table, draw the plot, and give both to the runs' trackers.

        Args:
            metric: dotted key of summary.json to compare by; None takes the linear probe, or the speed of a benchmark.
        """
        self.write(jobs)
        self.refresh(jobs)
        self.write(jobs)
        metric = metric or default_metric(jobs)
        text = table(jobs, metric, f"Sweep {self.folder.name}", self.folder)
        print(f"\n{text}", flush=True)
        files = [self.folder / "table.txt"]
        atomic_write(files[0], text + "\n")
        if groups(jobs, metric)[1]:
            from hjepa.sweeps.plots import plot, plot_progress

            files.append(self.folder / "sweep.png")
            plot(jobs, metric, f"Sweep {self.folder.name}", files[1])
            files += plot_progress(jobs, f"Sweep {self.folder.name}", self.folder / "progress.png")
            print(f"Plots: {', '.join(str(file) for file in files[1:])}")
        log_artifacts_of_jobs(jobs, files, "sweep", {"sweep": self.folder.name})
        print(f"Sweep folder: {self.folder}", flush=True)

    def returns(self, jobs: list[Job]) -> list[JobReturn]:
        """What Hydra's sweeper gets.

        Raises:
            UserError: jobs failed or were stopped.
        """
        failed = [str(job.number) for job in jobs if not job.is_complete]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(jobs)} jobs did not finish (number {', '.join(failed)}): the table says why; "
                "the same command does what is missing."
            )
        metric = default_metric(jobs)
        values = [lookup(job.summary, metric) for job in jobs]
        return [JobReturn(j.overrides, status=JobStatus.COMPLETED, _return_value=v) for j, v in zip(jobs, values, strict=True)]


class SweepStart(Callback):
    """What every launcher needs before a sweep: a folder that can be written, and the sweep's name for its jobs' trackers."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).expanduser().absolute()
        try:
            check_writable(folder)
        except UserError as error:
            sys.exit(str(error))  # Hydra would only warn of any other exception here, and fail later
        os.environ[SWEEP] = folder.name


def log_artifacts_of_jobs(jobs: list[Job], files: list[Path], folder: str, tags: dict[str, str]) -> None:
    """Give every tracked run the files, into a folder of its artifacts, and the tags; with tags also its number."""
    trackers: dict[str, Any] = {}
    for job in jobs:
        if job.folder and job.summary.get("run_id"):
            options = read_config(job.folder)["tracking"]
            key = json.dumps(options)
            trackers[key] = trackers.get(key) or build_trackers(options)
            own = tags | {"job": str(job.number)} if tags else {}
            trackers[key].add_artifacts(job.summary["run_id"], Artifacts(files, folder, own))


def check_metric(jobs: list[Job], metric: str | None) -> None:
    """Refuse a metric that no job has."""
    if metric and all(lookup(job.summary, metric) is None for job in jobs):
        numbers = ", ".join(sorted({key for job in jobs for key in flatten(job.summary) if lookup(job.summary, key) is not None}))
        raise UserError(f"task.metric={metric}: none of the runs has it; expected one of {numbers or 'none yet'}.")
