"""The folder of a sweep, from which its tables and plots are made.

A launcher plans the jobs, runs them, calls `Sweep.save` whenever the state of a job changes, and `Sweep.summarize` at the end.
All results are read from the run folders, so table and plots can be made again at any time (`task=sweep`).

    sweep.json                             jobs, their states and results, for programs
    multirun.yaml                          the config of the whole sweep, from Hydra
    table.txt, sweep.png, progress.png     the same for people
    N.log                                  link to the output of job N
    submitit/, submitit.log                pickles, scripts and logs of submitit; messages of its own processes
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.identity import flatten
from hjepa.config.passwords import hide_passwords
from hjepa.config.schema import Config
from hjepa.sweeps.job import Job
from hjepa.sweeps.tables import Comparison, default_metric, lookup, results
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.provenance import SWEEP_VARIABLE
from hjepa.tracking.run_folder import check_writable, read_summary
from hjepa.tracking.tracker import Artifacts, build_trackers, trackers_of_run

SAVED_FIELDS = ("number", "overrides", "folder", "log", "state", "reason", "slurm_id")


class Sweep:
    """The folder of a sweep.

    Args:
        folder: Absolute path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "sweep.json"
        self.loaded_version = 0

    def save(self, jobs: list[Job]) -> None:
        """Write sweep.json."""
        rows = [{key: getattr(job, key) for key in SAVED_FIELDS} | {"results": results(job.summary)} for job in jobs]
        content = {"sweep": self.folder.name, "jobs": hide_passwords(rows)}
        atomic_write(self.file, json.dumps(content, indent=2, default=str) + "\n")

    def hide_passwords(self) -> None:
        """Hide the passwords in the config that Hydra's sweeper has written into the folder."""
        file = self.folder / "multirun.yaml"
        if file.exists():
            atomic_write(file, hide_passwords(file.read_text()))

    def link_log(self, number: int, log: Path) -> Path:
        """Let N.log of this folder be a link to the log of a job, and return it; return the log where links are not supported."""
        link = self.folder / f"{number}.log"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(log, self.folder))
        except OSError:
            return log
        return link

    def load(self) -> list[Job]:
        """Return the jobs from sweep.json; the state of a complete job whose run folder no longer exists is `missing`.

        Raises:
            UserError: There is no sweep.json, or none of the run folders of complete jobs exists.
        """
        if not self.file.exists():
            raise UserError(f"{self.folder} is no sweep folder: it has no sweep.json; set a folder that a sweep has printed.")
        self.loaded_version = self.file.stat().st_mtime_ns
        jobs = [Job(**{key: row[key] for key in SAVED_FIELDS}) for row in json.loads(self.file.read_text())["jobs"]]
        for job in jobs:
            job.folder, job.log = (self.locate(Path(path)) if path else None for path in (job.folder, job.log))
        complete = [job for job in jobs if job.is_complete]
        missing = [job for job in complete if job.folder and not job.folder.exists()]
        for job in missing:
            job.state, job.reason = "missing", "its run folder was moved or removed"
        if missing and len(missing) == len(complete):
            raise UserError(
                f"The runs of {self.folder} were moved or removed, for example {missing[0].folder}; move them back, or move the "
                "sweep folder and the folders of its runs together."
            )
        return jobs

    def locate(self, path: Path) -> Path:
        """Return where a file or folder below output_root is now, if it was moved together with the sweep folder."""
        root = self.folder.parent.parent
        moved = (root.joinpath(*path.parts[i:]) for i in range(1, len(path.parts) - 1))
        return path if path.exists() else next((place for place in moved if place.exists()), path)

    def has_changed(self) -> bool:
        """Return whether a command that follows the jobs has written sweep.json after it was loaded."""
        return self.file.stat().st_mtime_ns != self.loaded_version

    def refresh(self, jobs: list[Job]) -> None:
        """Update states and results from the run folders; a failed job stays failed until its run is continued."""
        for job in jobs:
            file = job.folder / "summary.json" if job.folder else None
            if not file or not file.exists():
                continue
            summary = read_summary(file.parent)
            if job.state == "FAILED" and file.stat().st_mtime <= self.file.stat().st_mtime:
                continue
            job.update_from_summary(summary)

    def summarize(self, jobs: list[Job], metric: str | None = None, config: Config | None = None, save: bool = True) -> None:
        """Print and save the table, plot the results, and log both to the trackers of the runs.

        Args:
            jobs: All jobs of the sweep, with their present states and summaries.
            metric: Dotted key of summary.json to compare by. None: the linear probe, or the speed of a benchmark.
            config: Config of the current command, for the passwords of trackers that the jobs lack.
            save: Write the states of the jobs to sweep.json.
        """
        if save:
            self.save(jobs)
        title = f"Sweep {self.folder.name}"
        comparison = Comparison(jobs, metric or default_metric(jobs))
        text = comparison.to_text(title, self.folder)
        print(f"\n{text}", flush=True)
        files = [self.folder / "table.txt"]
        atomic_write(files[0], text + "\n")
        if comparison.values(comparison.metric):
            from hjepa.sweeps.plots import save_plots

            files += save_plots(comparison, title, self.folder / "sweep.png")
        log_artifacts_of_jobs(jobs, files, "sweep", {"sweep": self.folder.name}, config)
        print(f"Sweep folder: {self.folder}", flush=True)

    def job_returns(self, jobs: list[Job]) -> list[JobReturn]:
        """Return what Hydra's sweeper expects of a launcher.

        Raises:
            UserError: Jobs failed or were stopped.
        """
        incomplete = [str(job.number) for job in jobs if not job.is_complete]
        if incomplete:
            raise UserError(
                f"{len(incomplete)} of {len(jobs)} jobs did not finish (number {', '.join(incomplete)}): the table shows the "
                "reasons; run the same command again to do what is missing."
            )
        metric = default_metric(jobs)
        values = [lookup(job.summary, metric) for job in jobs]
        return [JobReturn(j.overrides, status=JobStatus.COMPLETED, _return_value=v) for j, v in zip(jobs, values, strict=True)]

    def trial_returns(self, jobs: list[Job]) -> list[JobReturn]:
        """Return what a sweeper that searches expects of a launcher; trials without a result have failed."""
        metric, returns = default_metric(jobs), []
        for job in jobs:
            value = lookup(job.summary, metric) if job.is_complete else None
            failure = UserError(f"job {job.number} {job.state}: {job.reason}")
            status = JobStatus.FAILED if value is None else JobStatus.COMPLETED
            returns.append(JobReturn(job.overrides, status=status, _return_value=failure if value is None else value))
        return returns


def runs_a_search(config: DictConfig) -> bool:
    """Return whether a sweeper chooses the jobs of a sweep by the results of earlier ones."""
    return config.hydra.runtime.choices["hydra/sweeper"] != "basic"


def check_search(config: DictConfig) -> None:
    """Raise a UserError for a search that cannot work: without a result to maximize, or in a database.

    Optuna 2.10, which hydra-optuna-sweeper requires, fails with SQLAlchemy 2.
    """
    choices = config.hydra.runtime.choices
    if runs_a_search(config) and choices.get("task") == "train" and choices.get("probe") == "none":
        raise UserError(
            "probe=none: a search maximizes the accuracy of the linear probe, which needs labels; leave the option out, or "
            "compare the runs of a sweep by task=evaluate 'protocol=[quality]'."
        )
    storage = config.hydra.sweeper.get("storage")
    if storage and not str(storage).startswith("redis"):
        raise UserError(
            f"hydra.sweeper.storage={storage}: Optuna 2.10 cannot use a database through SQLAlchemy 2; leave the option out: the "
            "same command continues a search, also with more trials."
        )


class SweepStart(Callback):
    """Hydra callback that prepares a sweep for any launcher: takes its folder, and passes its name on to the jobs' trackers.

    At the end of a search, which launches jobs several times, it makes the table.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if runs_a_search(config):
            sweep = Sweep(Path(config.hydra.sweep.dir))
            jobs = sweep.load()
            sweep.refresh(jobs)
            tracking = OmegaConf.to_container(config.tracking, resolve=True)
            sweep.summarize(jobs, config={"tracking": tracking})

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).expanduser().absolute()
        try:
            check_search(config)
            check_writable(folder)
        except UserError as error:
            sys.exit(hide_passwords(str(error)))  # Hydra would only warn of any other exception here, and fail later
        if "${now:" in OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"]:  # type: ignore[call-overload, index]
            folder = take_folder(folder)
        config.hydra.sweep.dir = str(folder)
        if not runs_a_search(config):
            create_private(folder / "multirun.yaml")  # which Hydra fills in with all passwords before it checks what is swept
        os.environ[SWEEP_VARIABLE] = folder.name
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until here, Ctrl-C ends the process, see `hjepa.cli`


def create_private(file: Path) -> None:
    """Create an empty file that only its owner can read; an existing file keeps what it contains."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.chmod(0o600)


def take_folder(folder: Path) -> Path:
    """Create a folder that no other sweep has, and return it: another sweep may have begun in the same second."""
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = folder.with_name(f"{folder.name.removesuffix(f'_{number - 1}')}_{number}")
    raise AssertionError


def log_artifacts_of_jobs(
    jobs: list[Job], files: list[Path], folder: str, tags: dict[str, str], config: Config | None = None
) -> None:
    """Log files and tags to every tracked run.

    Args:
        jobs: Jobs with their summaries.
        files: Files to log.
        folder: Folder among the artifacts of a run.
        tags: Tags for every run. If there are any, each run is also tagged with the number of its job.
        config: Config of the current command; jobs without a config take addresses and passwords of trackers from it.
    """
    trackers: dict[str, Any] = {}
    for job in jobs:
        if job.folder and job.summary.get("run_id"):
            options = job.config["tracking"] if job.config else trackers_of_run(config or {"tracking": {}}, job.folder)
            key = json.dumps(options)
            trackers[key] = trackers.get(key) or build_trackers(options)
            job_tags = tags | {"job": str(job.number)} if tags else {}
            trackers[key].add_artifacts(job.summary["run_id"], Artifacts(files, folder, job_tags))


def check_metric(jobs: list[Job], metric: str | None) -> None:
    """Raise a UserError if no job has the metric."""
    if metric and all(lookup(job.summary, metric) is None for job in jobs):
        keys = ", ".join(sorted({key for job in jobs for key in flatten(job.summary) if lookup(job.summary, key) is not None}))
        raise UserError(f"task.metric={metric}: none of the runs has it; expected one of {keys or 'none yet'}.")
