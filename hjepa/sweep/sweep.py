"""A sweep: its jobs, planned before anything starts, and what is known of them in the sweep folder.

A launcher plans the jobs, runs them wherever it does, calls `write` whenever a job's state changes, and `end` at last. All
results come from the run folders, so the table and the plot can be made anew at any time (`task=sweep`).

    sweep.json   the jobs, their states and results        table.txt, sweep.png, progress.png   for people
    N.log        what job N said
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hjepa.config import Config, flatten
from hjepa.errors import UserError
from hjepa.folder import RunFolder, read_config, refuse_unwritable
from hjepa.origin import SWEEP
from hjepa.run import prepare
from hjepa.sweep.jobs import Job
from hjepa.sweep.table import default_metric, groups, lookup, results, table
from hjepa.tracking.trackers import Addition, build_trackers

KEPT = ("number", "overrides", "folder", "log", "state", "reason", "slurm_id")


def plan_jobs(loader: ConfigLoader, master: DictConfig, overrides: Sequence[Sequence[str]], first: int = 0) -> list[Job]:
    """Compose every job: a wrong config is FAILED and a finished run is finished before anything starts.

    Args:
        loader, master: Hydra's, the config of the sweep; overrides: of each job; first: number of the first job.
    """
    if OmegaConf.select(master, "hydra.sweeper.max_batch_size"):
        raise UserError("hydra.sweeper.max_batch_size would end the sweep after a failed job; use hardware.slots instead.")
    jobs: list[Job] = []
    for number, job_overrides in enumerate(overrides, first):
        try:
            composed = loader.load_sweep_config(master, list(job_overrides))
            if composed.hydra.runtime.choices["hydra/launcher"] != master.hydra.runtime.choices["hydra/launcher"]:
                raise UserError(
                    "A sweep is launched as a whole: hardware=slurm_* cannot be chosen for a part of its jobs; give it alone, as "
                    "in `--multirun hardware=slurm_cpu seed=0,1`."
                )
            config, folder = prepare_job(composed)
            twin = next((job for job in jobs if job.folder == folder), None)
            if twin:
                raise UserError(
                    f"This is the run of job {twin.number} again: what differs changes no result, or name={config['name']} is "
                    "the same for both; sweep something that changes the result, and give no name."
                )
            done = RunFolder(folder, config).result() if config["task"]["_target_"] == "hjepa.run.train" else {}
        except UserError as error:
            jobs.append(Job(number, list(job_overrides), None, state="FAILED", reason=str(error)))
            continue
        state = "finished" if done else "pending"
        jobs.append(Job(number, list(job_overrides), folder, state=state, config=config, composed=composed))
    return jobs


def prepare_job(composed: DictConfig) -> tuple[Config, Path]:
    """The checked config of a job and the folder of its run."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        return prepare(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    finally:
        HydraConfig.instance().cfg = before


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
        temporary = self.folder / ".sweep.json.tmp"
        temporary.write_text(json.dumps({"sweep": self.folder.name, "jobs": rows}, indent=2, default=str) + "\n")
        temporary.replace(self.file)

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
            summary = json.loads(file.read_text())
            if job.state == "FAILED" and file.stat().st_mtime <= self.file.stat().st_mtime:
                continue
            job.learn(summary)

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
        files[0].write_text(text + "\n")
        if groups(jobs, metric)[1]:
            from hjepa.sweep.plot import plot
            from hjepa.sweep.progress import plot_progress

            files.append(self.folder / "sweep.png")
            plot(jobs, metric, f"Sweep {self.folder.name}", files[1])
            files += plot_progress(jobs, f"Sweep {self.folder.name}", self.folder / "progress.png")
            print(f"Plots: {', '.join(str(file) for file in files[1:])}")
        track(jobs, files, "sweep", {"sweep": self.folder.name})
        print(f"Sweep folder: {self.folder}", flush=True)

    def returns(self, jobs: list[Job]) -> list[JobReturn]:
        """What Hydra's sweeper gets.

        Raises:
            UserError: jobs failed or were stopped.
        """
        failed = [str(job.number) for job in jobs if not job.whole]
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
            refuse_unwritable(folder)
        except UserError as error:
            sys.exit(str(error))  # Hydra would only warn of any other exception here, and fail later
        os.environ[SWEEP] = folder.name


def track(jobs: list[Job], files: list[Path], folder: str, tags: dict[str, str]) -> None:
    """Give every tracked run the files, into a folder of its artifacts, and the tags; with tags also its number."""
    trackers: dict[str, Any] = {}
    for job in jobs:
        if job.folder and job.summary.get("run_id"):
            options = read_config(job.folder)["tracking"]
            key = json.dumps(options)
            trackers[key] = trackers.get(key) or build_trackers(options)
            own = tags | {"job": str(job.number)} if tags else {}
            trackers[key].add(job.summary["run_id"], Addition(files, folder, own))


def refuse_absent(jobs: list[Job], metric: str | None) -> None:
    """Refuse a metric that no job has."""
    if metric and all(lookup(job.summary, metric) is None for job in jobs):
        numbers = ", ".join(sorted({key for job in jobs for key in flatten(job.summary) if lookup(job.summary, key) is not None}))
        raise UserError(f"task.metric={metric}: none of the runs has it; expected one of {numbers or 'none yet'}.")


def show(config: Config, path: Path, folder: str, metric: str | None) -> None:
    """`task=sweep`: table and plot of a sweep anew, from its run folders as they are now.

    Args:
        folder: of the sweep; metric: see `Sweep.end`.
    """
    sweep = Sweep(Path(folder).expanduser().absolute())
    refuse_unwritable(sweep.folder)
    jobs = sweep.read()
    sweep.refresh(jobs)
    refuse_absent(jobs, metric)
    sweep.end(jobs, metric)
