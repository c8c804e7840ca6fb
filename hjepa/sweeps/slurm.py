"""Jobs on a SLURM cluster: one array, whose states come from SLURM and from the results that the jobs write.

This works without accounting (sacct) as well.
"""

import getpass
import io
import logging
import os
import re
import subprocess
import time
from collections.abc import Collection
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError

from hjepa.config.errors import UserError
from hjepa.sweeps.job import Job
from hjepa.sweeps.queue import Queue, error_of, private_pickles, saved_outcome
from hjepa.sweeps.submission import STOPPED_STATUS, Submission
from hjepa.tracking.provenance import git_state
from hjepa.tracking.resend import end_requeued_run

log = logging.getLogger(__name__)

END_STATES = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "UNKNOWN"),
    *("PREEMPTED", "REVOKED", "LAUNCH_FAILED"),
)

CONFIRMATION_SECONDS = 1  # between the polls of a command that follows no job

ASSOCIATIONS = "sacctmgr -P show associations user={user} format=account,partition,qos"

LISTS = {"partition": "sinfo -s", "account": ASSOCIATIONS, "qos": ASSOCIATIONS}  # commands that list what an option may be

LOG_TAIL_BYTES = 4096

AFTERMATH = re.compile(r"srun: .*Terminat(ed|ing) StepId")  # lines that follow the one with the reason

NUM_CONFIRMATIONS = 3  # polls that must agree on a failure: a requeued job passes through end states, and results may appear late


def check_options(options: dict[str, Any], jobs: list[Job]) -> None:
    """Raise a UserError for options that contradict each other or the config of a job that is to be submitted."""
    if options["signal_delay_s"] > 30 * options["timeout_min"]:
        raise UserError(
            f"hydra.launcher.signal_delay_s={options['signal_delay_s']} is more than half of "
            f"timeout_min={options['timeout_min']}: a job would save and go back to the queue soon after its start; lower "
            "signal_delay_s or raise timeout_min."
        )
    for option in ("mem_per_cpu", "mem_per_gpu"):
        if options[option] is not None and options["mem_gb"] is not None:
            raise UserError(
                f"hydra.launcher.{option}={options[option]} beside mem_gb={options['mem_gb']:g}: SLURM takes one of them; add "
                "hydra.launcher.mem_gb=null."
            )
    tasks = options["nodes"] * options["tasks_per_node"]
    for job in jobs:
        processes = None if job.is_done else job.config["hardware"]["processes"]
        if processes not in (None, tasks):  # SLURM starts and signals each process
            raise UserError(
                f"hardware.processes={processes}, but a job has {tasks} tasks (hydra.launcher.nodes x tasks_per_node), each of "
                f"which is a process; make them equal, as in hydra.launcher.tasks_per_node={processes}."
            )


def refusal(message: str, options: dict[str, Any]) -> str:
    """Return a sentence for the message of an sbatch that has failed; it names the option that is wrong."""
    reasons = [re.sub(r"^sbatch: error: (Batch job submission failed: )?", "", line) for line in message.splitlines()]
    sentence = f"SLURM refused the jobs: {'; '.join(reasons)}"
    wrong = re.search(f"invalid ({'|'.join(LISTS)})", message.lower())
    if not wrong:
        return f"{sentence}."
    option = wrong[1]
    command = LISTS[option].format(user=getpass.getuser())
    return f"{sentence}; change hydra.launcher.{option}={options[option] or 'null'} to one that `{command}` lists."


class SlurmQueue(Queue):
    """Jobs on a SLURM cluster, which go on without this process.

    Args:
        *arguments: Those of `Queue`.
        options: Options of the launcher.
    """

    cancel_command = "scancel"

    def __init__(self, *arguments: Any, options: dict[str, Any]) -> None:
        super().__init__(*arguments)
        check_options(options, self.jobs)
        self.options = options
        self.num_failed_polls = dict.fromkeys((job.number for job in self.jobs), 0)
        self.is_silent = False

    def submit(self) -> None:
        if not self.waiting:
            return
        jobs = list(self.waiting)
        self.waiting.clear()
        submissions = [Submission(job.config, job.path, job.composed, git_state()) for job in jobs]
        try:
            with private_pickles(self.executor.folder), redirect_stderr(io.StringIO()):  # where submitit prints the error as well
                submitted = self.executor.map_array(self.worker, submissions)
        except FailedJobError as error:
            raise UserError(refusal(str(error), self.options)) from None
        for job, submission in zip(jobs, submitted, strict=True):
            job.slurm_id = submission.job_id
            self.register(job, submission)
        self.sweep.save(self.jobs)
        self.print_jobs()
        if accounting_states([job.slurm_id for job in jobs]) is None:
            log.warning("sacct does not answer here: states of jobs are taken from squeue and the run folders")

    def poll(self, jobs: list[Job]) -> None:
        states = queue_states()
        if (states is None) != self.is_silent:
            self.is_silent = states is None
            log.warning("squeue %s", "does not answer; results show which jobs have ended" if self.is_silent else "answers again")
        if states is None:
            states = {job.slurm_id: job.state.upper() for job in jobs}
        elif any(job.slurm_id not in states for job in jobs):
            states = (accounting_states([job.slurm_id for job in jobs]) or {}) | states
        for job in jobs:
            self.update_state(job, states.get(job.slurm_id, "UNKNOWN"))

    def update_state(self, job: Job, slurm_state: str) -> None:
        """Set the state of a job from SLURM's state and from its results, which take precedence."""
        outcomes = self.outcomes(job)
        error = error_of(outcomes)
        has_failed = slurm_state in END_STATES or error is not None
        self.num_failed_polls[job.number] = self.num_failed_polls[job.number] + 1 if has_failed else 0
        if len(outcomes) == self.submitted[job.number].num_tasks and error is None:
            job.state = "finished"
        elif self.num_failed_polls[job.number] >= NUM_CONFIRMATIONS:
            fail(job, error or end_reason(job, slurm_state))
        elif slurm_state not in END_STATES:
            job.state = slurm_state.lower()

    def stop(self) -> None:
        print("\nInterrupted. The jobs continue without this command.", flush=True)
        self.print_jobs()
        raise SystemExit(STOPPED_STATUS)

    def kill(self) -> None:
        self.stop()


def end_reason(job: Job, slurm_state: str) -> str:
    """Return SLURM's state of a job that left no result, and the end of its log, where srun reports signals and exit codes."""
    line = last_line(job.log) if job.log else ""
    return f"ended by SLURM as {slurm_state}" + (f"; its log ends with: {line}" if line else "")


def last_line(file: Path) -> str:
    """Return the last line of a log that is not blank and does not match `AFTERMATH`, cut to 200 characters; empty if none."""
    with suppress(OSError), file.open("rb") as content:
        content.seek(max(0, file.stat().st_size - LOG_TAIL_BYTES))
        lines = [line.strip() for line in content.read().decode(errors="replace").splitlines()]
        return next((line[:200] for line in reversed(lines) if line and not AFTERMATH.match(line)), "")
    return ""


def fail(job: Job, reason: str) -> None:
    """Set the state of a job that has failed, also in its summary and trackers if it was waiting to be continued."""
    job.state, job.reason = "FAILED", reason
    if job.folder:
        end_requeued_run(job.folder, reason)


def update_from_slurm(jobs: list[Job]) -> None:
    """Set the states of the submitted jobs, in case no command follows them.

    The summary of a job that waits or runs again is that of its last session, so SLURM's state takes its place. A job that runs
    although its run is complete is only about to end.
    """
    submitted = [job for job in jobs if job.slurm_id]
    states = final_states(submitted)
    for job in submitted:
        state = states[job.slurm_id]
        if state in END_STATES:
            end(job, state)
        elif state and (state == "PENDING" or not job.is_complete):
            job.state, job.reason = state.lower(), ""


def end(job: Job, slurm_state: str) -> None:
    """Set the state of a job that SLURM has ended; the summary of a run or, without a run, the result of the job may know it."""
    if job.is_done:
        return
    outcome = None if job.folder else saved_outcome(job)
    if outcome:
        job.state, job.reason = outcome
    elif slurm_state != "COMPLETED":
        fail(job, end_reason(job, slurm_state))
    elif not job.folder:
        job.state = "finished"


def final_states(jobs: list[Job]) -> dict[str, str]:
    """Return SLURM's states by job id: UNKNOWN if SLURM has forgotten the job, empty if it does not answer.

    Jobs that seem to have ended are asked for again, because a requeued job passes through end states.
    """
    ids = [job.slurm_id for job in jobs]
    undecided = [job.slurm_id for job in jobs if not job.is_done]
    states: dict[str, str] = {}
    logs = [job.log for job in jobs if job.log and os.path.lexists(job.log)]
    owners = {os.getuid(), *(log.lstat().st_uid for log in logs)}  # a colleague may have submitted the jobs
    for attempt in range(NUM_CONFIRMATIONS if ids else 0):
        time.sleep(CONFIRMATION_SECONDS if attempt else 0)
        queued = queue_states(owners)
        known = (accounting_states(ids) or {}) | (queued or {})
        states = {job_id: known.get(job_id, "" if queued is None else "UNKNOWN") for job_id in ids}
        if not any(states[job_id] in END_STATES for job_id in undecided):
            break
    return states


def run_command(*command: str) -> str | None:
    """Return the output of a SLURM command, or None if it failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def accounting_states(ids: list[str]) -> dict[str, str] | None:
    """Return SLURM's states by job id from the accounting database, or None if there is none or it does not answer.

    The database learns of a job some seconds after it has been submitted, and finds tasks that were never started only by their
    array.
    """
    arrays = ",".join(sorted({job.partition("_")[0] for job in ids}))
    whole = "SLURM_BITSTR_LEN=0"  # otherwise sacct shortens long lists of tasks
    answer = run_command("env", whole, "sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", arrays)
    return None if answer is None else parse_states(answer)


def queue_states(users: Collection[int] = ()) -> dict[str, str] | None:
    """Return SLURM's states by job id of recent jobs, or None if the controller does not answer.

    Args:
        users: Ids of the users whose jobs are listed; empty for those of this user.
    """
    whose = f"--user={','.join(map(str, sorted(users)))}" if users else "--me"
    answer = run_command("squeue", "-h", "-r", whose, "--states=all", "-o", "%i|%T")
    return None if answer is None else parse_states(answer)


def parse_states(text: str) -> dict[str, str]:
    """Parse lines of `job|STATE ...` into {job: STATE}.

    Tasks of an array that were never started share a line, even if some of them also have one of their own, which counts.
    """
    rows = [line.split("|") for line in text.splitlines()]
    together = {job: state.split()[0] for tasks, state in rows for job in task_ids(tasks)}
    return together | {job: state.split()[0] for job, state in rows}


def task_ids(job: str) -> list[str]:
    """Return the ids of the tasks that are listed as `7_[0-3,5%2]` or `7_[0-20:2]`; none for the id of a single job."""
    array, _, tasks = job.partition("_[")
    ranges = re.findall(r"(\d+)-?(\d*):?(\d*)", tasks.partition("%")[0])
    return [f"{array}_{i}" for first, last, step in ranges for i in range(int(first), int(last or first) + 1, int(step or 1))]
