"""The loop that both launchers share: it submits the jobs of a sweep through submitit and follows them until all have ended."""

import contextlib
import logging
import pickle
import shlex
import stat
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import pickle_load

from hjepa.config.paths import PROGRAM
from hjepa.sweeps.job import Job
from hjepa.sweeps.submission import STOPPED
from hjepa.sweeps.sweep import Sweep
from hjepa.sweeps.tables import default_metric, format_value, label_of, lookup
from hjepa.training.signals import StopFlag

log = logging.getLogger(__name__)

SLICE_SECONDS = 0.1  # a stop signal is noticed within this time

Outcome = tuple[str, Any]  # ("success", value) or ("error", traceback)


class Queue(ABC):
    """Jobs that wait, run and end.

    Args:
        sweep: Folder of the sweep.
        jobs: All jobs of the sweep, including those that are done already.
        worker: Function that runs in the process of a job. Its argument is a `Submission`.
        executor: submitit executor, configured with the requested resources.
        poll_seconds: Time between two looks at the jobs.

    Attributes:
        waiting: Jobs that have not been submitted.
        submitted: submitit job of each submitted job, by `Job.number`.
    """

    def __init__(self, sweep: Sweep, jobs: list[Job], worker: Any, executor: submitit.Executor, poll_seconds: float) -> None:
        self.sweep, self.jobs, self.worker, self.executor = sweep, jobs, worker, executor
        self.poll_seconds = poll_seconds
        self.waiting = deque(job for job in jobs if not job.is_done)
        self.submitted: dict[int, submitit.Job[Any]] = {}
        self.started_at: dict[int, float] = {}

    cancel_command = ""  # shell command that cancels jobs; their ids are appended

    # -- what the two kinds of queues do differently -------------------------------------------------------------------

    @abstractmethod
    def submit(self) -> None:
        """Submit the jobs that may be submitted now."""

    @abstractmethod
    def poll(self, jobs: list[Job]) -> None:
        """Set the states of submitted jobs that have not ended yet."""

    @abstractmethod
    def stop(self) -> None:
        """Handle the first Ctrl-C or SIGTERM: end the running jobs, or this process."""

    @abstractmethod
    def kill(self) -> None:
        """Handle the second Ctrl-C, which ends the loop."""

    # -- what they share -----------------------------------------------------------------------------------------------

    def array_ids(self, jobs: list[Job]) -> list[str]:
        """Return the ids that cancel jobs: an array is cancelled as a whole."""
        return sorted({self.submitted[job.number].job_id.partition("_")[0] for job in jobs})

    def print_jobs(self) -> None:
        """Print the running jobs with their run folders, and how to view and cancel them."""
        print(f"Submitted jobs and their run folders (logs: {self.sweep.folder}/N.log):")
        for job in self.running:
            print(f"  {self.submitted[job.number].job_id:>8}  {job.folder or ''}".rstrip())
        print(f"To see their table at any time: {PROGRAM} task=sweep task.folder={shlex.quote(str(self.sweep.folder))}")
        print(f"To cancel them all: {self.cancel_command} {' '.join(self.array_ids(self.running))}", flush=True)

    @property
    def running(self) -> list[Job]:
        """The submitted jobs that have not ended, as far as is known."""
        return [job for job in self.jobs if job.number in self.submitted and not job.is_done]

    def follow(self) -> bool:
        """Submit and follow the jobs until all have ended, and return whether the sweep was stopped."""
        stopping = False
        try:
            with StopFlag() as stop:
                while self.running or (self.waiting and not stop):
                    if not stop:
                        self.submit()
                    elif not stopping:
                        stopping = True
                        self.stop()
                    self.update()
                    self.pause(stop, stopping)
                return stopping or bool(stop and self.waiting)
        except KeyboardInterrupt:
            self.kill()
            self.update()
        return True

    def pause(self, stop: StopFlag, stopping: bool) -> None:
        """Sleep until the next look at the jobs, or until a stop signal arrives."""
        end = time.monotonic() + self.poll_seconds
        while self.running and time.monotonic() < end and bool(stop) == stopping:
            time.sleep(min(SLICE_SECONDS, self.poll_seconds))

    def register(self, job: Job, submitted: submitit.Job[Any]) -> None:
        """Remember a submitted job, and link its log as N.log in the sweep folder."""
        self.submitted[job.number] = submitted
        job.reason, job.log = "", self.sweep.link_log(job.number, submitted.task(0).paths.stdout)

    def update(self) -> None:
        """Poll, and log and save what has changed."""
        jobs = self.running
        before = [job.state for job in jobs]
        self.poll(jobs)
        changed = [job for job, state in zip(jobs, before, strict=True) if job.state != state]
        if changed:
            self.sweep.save(self.jobs)
        for job in changed:
            self.report(job)

    def report(self, job: Job) -> None:
        """Log the new state of a job and, at its end, its result."""
        if not job.is_done:
            if job.state == "running":
                self.started_at[job.number] = time.monotonic()
            label = label_of(self.jobs, job)
            log.info("job %d %s%s (log %s)", job.number, job.state, f": {label}" if label else "", job.log)
            return
        self.sweep.refresh([job])
        metric = default_metric([job])
        result = f"{metric} {format_value(lookup(job.summary, metric), metric)}" if job.state == "finished" else job.reason
        duration = f" after {time.monotonic() - self.started_at[job.number]:.0f} s" if job.number in self.started_at else ""
        done = sum(job.is_done for job in self.jobs)
        log.info("job %d %s%s (%d of %d): %s", job.number, job.state, duration, done, len(self.jobs), result)

    def outcomes(self, job: Job) -> list[Outcome]:
        """Return what the processes of a job have returned or raised so far."""
        submitted = self.submitted[job.number]
        paths = [submitted.task(rank).paths.result_pickle for rank in range(submitted.num_tasks)]
        return [pickle_load(path) for path in paths if path.exists()]


@contextlib.contextmanager
def private_pickles(folder: Path) -> Iterator[None]:
    """Let only the owner read the configs that submitit writes meanwhile, since they may contain passwords.

    The umask stays as it is, because jobs take it over: other users may read their logs and runs.

    Args:
        folder: Folder of submitit, to which nobody else has access meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    folder.chmod(0o700)
    try:
        yield
    finally:  # also after a refused submission
        for file in folder.glob("*.pkl"):
            with contextlib.suppress(FileNotFoundError):  # a job that is requeued replaces its own
                if stat.S_IMODE(file.stat().st_mode) != 0o600:
                    file.chmod(0o600)
        folder.chmod(mode)


class PlainUnpickler(pickle.Unpickler):
    """Reads plain data only, because the pickle of an object could execute anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def saved_outcome(job: Job) -> tuple[str, str] | None:
    """Return the state and the reason of a job by what its first process has written beside its log; None without a result."""
    log_file = job.log.resolve() if job.log else Path("none")
    file = log_file.with_name(f"{log_file.name.removesuffix('_log.out')}_result.pkl")
    if not file.exists():
        return None
    with file.open("rb") as content, contextlib.suppress(pickle.UnpicklingError, EOFError):
        return state_of([PlainUnpickler(content).load()])
    return None


def state_of(outcomes: list[Outcome]) -> tuple[str, str] | None:
    """Return the state and the reason of a job of one process by its outcomes; None without any."""
    if error := error_of(outcomes):
        return "FAILED", error
    if not outcomes:
        return None
    return ("stopped", "stopped by a signal") if outcomes[0][1] == STOPPED else ("finished", "")


def error_of(outcomes: list[Outcome]) -> str | None:
    """Return the message of the first exception that a process has raised, without the class name of a UserError."""
    traceback = next((value for outcome, value in outcomes if outcome == "error"), None)
    return traceback and traceback.strip().splitlines()[-1].removeprefix("hjepa.config.errors.UserError: ")
