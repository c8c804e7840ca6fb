"""What SLURM and the jobs' own results say of submitted jobs, until each has ended, also where accounting (sacct) is missing."""

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit.core.utils import JobPaths, pickle_load

from hjepa.sweeps.job import Job

log = logging.getLogger(__name__)

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "UNKNOWN")

LOOKS = 3  # that must agree on a bad end: a requeue passes through such states, and results appear late on some file systems


def ask(*command: str) -> str | None:
    """The output of a SLURM command, None if it failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def accounting(ids: list[str]) -> dict[str, str]:
    """SLURM's states by job id from the accounting database; empty where there is none."""
    return table(ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(ids)) or "")


def listing() -> dict[str, str] | None:
    """SLURM's states by job id of the user's jobs that the controller still knows; None if it does not answer."""
    answer = ask("squeue", "-h", "-r", "--me", "--states=all", "-o", "%i|%T")
    return None if answer is None else table(answer)


def table(text: str) -> dict[str, str]:
    """Lines of `job|STATE ...` as {job: STATE}."""
    rows = (line.split("|") for line in text.splitlines())
    return {job: state.split()[0] for job, state in rows}


class SlurmQueue:
    """Submitted jobs.

    Args:
        jobs: with their `slurm_id`; folder: where submitit keeps their results; processes: of each job.
    """

    def __init__(self, jobs: list[Job], folder: Path, processes: int) -> None:
        self.jobs, self.folder, self.processes = jobs, folder, processes
        self.looks = dict.fromkeys((job.slurm_id for job in jobs), 0)
        self.silent = False

    def follow(self, seconds: float, changed: Callable[[], None]) -> None:
        """Until all jobs have ended: look every so many seconds, say and report what changed."""
        while waiting := [job for job in self.jobs if not job.is_done]:
            before = [job.state for job in waiting]
            self.look(waiting)
            for job, state in zip(waiting, before, strict=True):
                if job.state != state:
                    log.info("job %d (%s): %s %s", job.number, job.slurm_id, job.state, job.reason)
            if before != [job.state for job in waiting]:
                changed()
            if not all(job.is_done for job in waiting):
                time.sleep(seconds)

    def look(self, jobs: list[Job]) -> None:
        """Learn the state of jobs that have not ended so far."""
        states = listing()
        if (states is None) != self.silent:
            self.silent = states is None
            log.warning("squeue %s", "does not answer; results tell which jobs have ended" if self.silent else "answers again")
        if states is None:
            states = {job.slurm_id: job.state.upper() for job in jobs}
        elif any(job.slurm_id not in states for job in jobs):
            states = accounting(sorted({job.slurm_id.split("_")[0] for job in jobs})) | states
        for job in jobs:
            self.learn(job, states.get(job.slurm_id, "UNKNOWN"))

    def learn(self, job: Job, state: str) -> None:
        """Note SLURM's state of a job, or its end: what its processes have left behind counts more."""
        results = self.results(job)
        errors = [value for outcome, value in results if outcome == "error"]
        self.looks[job.slurm_id] = self.looks[job.slurm_id] + 1 if state in ENDED or errors else 0
        if len(results) == self.processes and not errors:
            job.state = "finished"
        elif self.looks[job.slurm_id] >= LOOKS:
            job.state, job.reason = "FAILED", last_line(errors[0]) if errors else f"ended by SLURM as {state}"
        elif state not in ENDED:
            job.state = state.lower()

    def results(self, job: Job) -> list[tuple[str, Any]]:
        """What the processes of a job have returned so far: ("success", value) or ("error", traceback)."""
        paths = [JobPaths(self.folder, job.slurm_id, rank).result_pickle for rank in range(self.processes)]
        return [pickle_load(path) for path in paths if path.exists()]


def last_line(traceback: str) -> str:
    """What was raised, without the name of our own exception."""
    return traceback.strip().splitlines()[-1].removeprefix("hjepa.config.errors.UserError: ")
