"""States of submitted jobs, from SLURM and from the results that the jobs write; works without accounting (sacct) as well."""

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit.core.utils import JobPaths, pickle_load

from hjepa.sweeps.job import Job

log = logging.getLogger(__name__)

END_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "UNKNOWN")

NUM_CONFIRMATIONS = 3  # polls that must agree on a failure: a requeued job passes through end states, and results may appear late


def run_command(*command: str) -> str | None:
    """Return the output of a SLURM command, or None if it failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def accounting_states(ids: list[str]) -> dict[str, str]:
    """Return SLURM's states by job id from the accounting database; empty if there is none."""
    return parse_states(run_command("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(ids)) or "")


def queue_states() -> dict[str, str] | None:
    """Return SLURM's states by job id of the user's recent jobs, or None if the controller does not answer."""
    answer = run_command("squeue", "-h", "-r", "--me", "--states=all", "-o", "%i|%T")
    return None if answer is None else parse_states(answer)


def parse_states(text: str) -> dict[str, str]:
    """Parse lines of `job|STATE ...` into {job: STATE}."""
    rows = (line.split("|") for line in text.splitlines())
    return {job: state.split()[0] for job, state in rows}


class SlurmQueue:
    """Follows submitted jobs until all have ended.

    Args:
        jobs: Jobs with their `slurm_id`.
        folder: Folder in which submitit keeps their results.
        num_processes: Processes of each job.
    """

    def __init__(self, jobs: list[Job], folder: Path, num_processes: int) -> None:
        self.jobs, self.folder, self.num_processes = jobs, folder, num_processes
        self.num_failed_polls = dict.fromkeys((job.slurm_id for job in jobs), 0)
        self.is_silent = False

    def follow(self, seconds: float, on_change: Callable[[], None]) -> None:
        """Poll until all jobs have ended, and log changes.

        Args:
            seconds: Time between two polls.
            on_change: Called after any state has changed.
        """
        while running := [job for job in self.jobs if not job.is_done]:
            before = [job.state for job in running]
            self.poll(running)
            for job, state in zip(running, before, strict=True):
                if job.state != state:
                    log.info("job %d (%s): %s %s", job.number, job.slurm_id, job.state, job.reason)
            if before != [job.state for job in running]:
                on_change()
            if not all(job.is_done for job in running):
                time.sleep(seconds)

    def poll(self, jobs: list[Job]) -> None:
        """Update the states of jobs that have not ended yet."""
        states = queue_states()
        if (states is None) != self.is_silent:
            self.is_silent = states is None
            log.warning("squeue %s", "does not answer; results show which jobs have ended" if self.is_silent else "answers again")
        if states is None:
            states = {job.slurm_id: job.state.upper() for job in jobs}
        elif any(job.slurm_id not in states for job in jobs):
            states = accounting_states(sorted({job.slurm_id.split("_")[0] for job in jobs})) | states
        for job in jobs:
            self.update(job, states.get(job.slurm_id, "UNKNOWN"))

    def update(self, job: Job, slurm_state: str) -> None:
        """Set the state of a job from SLURM's state and from its results, which take precedence."""
        results = self.results(job)
        errors = [value for outcome, value in results if outcome == "error"]
        has_failed = slurm_state in END_STATES or bool(errors)
        self.num_failed_polls[job.slurm_id] = self.num_failed_polls[job.slurm_id] + 1 if has_failed else 0
        if len(results) == self.num_processes and not errors:
            job.state = "finished"
        elif self.num_failed_polls[job.slurm_id] >= NUM_CONFIRMATIONS:
            job.state, job.reason = "FAILED", last_line(errors[0]) if errors else f"ended by SLURM as {slurm_state}"
        elif slurm_state not in END_STATES:
            job.state = slurm_state.lower()

    def results(self, job: Job) -> list[tuple[str, Any]]:
        """Return the results of a job's processes so far: ("success", value) or ("error", traceback)."""
        paths = [JobPaths(self.folder, job.slurm_id, rank).result_pickle for rank in range(self.num_processes)]
        return [pickle_load(path) for path in paths if path.exists()]


def last_line(traceback: str) -> str:
    """Return the message of the raised exception, without the class name if that is UserError."""
    return traceback.strip().splitlines()[-1].removeprefix("hjepa.config.errors.UserError: ")
