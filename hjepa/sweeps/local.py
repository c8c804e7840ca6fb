"""Jobs on this machine: at most `hardware.slots` at a time, in order, each with its share of the cores and GPUs.

Each job is a process of its own, which submitit starts and a controller process of submitit watches. A job gives the same result
as when it is run alone, and a killed job harms no other.
"""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.distributed.resources import gpus, num_cores
from hjepa.sweeps.job import Job
from hjepa.sweeps.queue import Queue, private_pickles, saved_outcome, state_of
from hjepa.sweeps.submission import LocalSubmission
from hjepa.tracking.provenance import git_state
from hjepa.tracking.run_folder import try_lock

log = logging.getLogger(__name__)

KILLED = "FAILED", "its process was killed, by hand or because memory ran out"

IGNORED = {"cpus_per_task": "hardware.threads", "mem_gb": "hardware.slots"}  # options that submitit ignores, and others to use


def check_options(options: dict[str, Any], jobs: list[Job]) -> None:
    """Raise a UserError for options of the launcher that make no sense on this machine."""
    for option, instead in IGNORED.items():
        if options[option] is not None:
            raise UserError(f"hydra.launcher.{option} is not limited on this machine; leave it out, and see {instead}.")
    if options["nodes"] * options["tasks_per_node"] != 1:
        raise UserError("Jobs on this machine are started as one task; set hardware.processes to run each in several processes.")
    slots = slot_count([job.config for job in jobs if job.config])
    pending = sum(not job.is_done for job in jobs)
    if not options["wait"] and pending > slots:
        raise UserError(
            f"hydra.launcher.wait=false: {pending} jobs, but hardware.slots={slots}, and none would start the others; set "
            f"hardware.slots={pending}, or leave out wait=false and run the command with nohup in the background."
        )


def slot_count(configs: list[Config]) -> int:
    """Return the number of slots; raise a UserError if the machine has too few cores for them."""
    hardware_options = [config["hardware"] for config in configs]
    slots: int = max((hardware["slots"] for hardware in hardware_options), default=1)
    if len({hardware["slots"] for hardware in hardware_options}) > 1:
        raise UserError("hardware.slots differs between the jobs; set one number for the whole sweep.")
    threads = max(((hardware["threads"] or 1) * (hardware["processes"] or 1) for hardware in hardware_options), default=1)
    if slots < 1 or (slots > 1 and slots * threads > num_cores()):
        raise UserError(
            f"hardware.slots={slots} with {threads} threads each: expected 1 to {max(1, num_cores() // threads)} slots on the "
            f"{num_cores()} cores of this machine."
        )
    return slots


def gpu_shares(configs: list[Config], gpus_per_job: int | None = None) -> list[list[str]]:
    """Return the GPUs of every slot.

    Args:
        configs: Configs of the jobs.
        gpus_per_job: Number of GPUs of every slot. None: an equal share of them.

    Raises:
        UserError: The machine has too few cores or GPUs for the slots.
    """
    slots, available = slot_count(configs), gpus()
    if slots > len(available) > 0 and any(config["hardware"]["device"] in ("cuda", "auto") for config in configs):
        raise UserError(f"hardware.slots={slots}: every slot needs a GPU of its own, and this machine has {len(available)}.")
    size = len(available) // slots if gpus_per_job is None else gpus_per_job
    if slots * size > len(available):
        raise UserError(
            f"hydra.launcher.gpus_per_node={size} with hardware.slots={slots}: this machine has {len(available)} GPUs."
        )
    return [available[slot * size : (slot + 1) * size] for slot in range(slots)]


@contextmanager
def detached(file: Path) -> Iterator[None]:
    """Let processes that are started meanwhile write to a file instead of to the terminal or pipe, and ignore Ctrl-C.

    A Ctrl-C in the terminal must not end a job before `LocalSubmission.run` has begun, and a pipe would otherwise stay open until
    the jobs have ended.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    copies = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        with file.open("a") as target:
            for descriptor in copies:
                os.dup2(target.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in copies.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        signal.signal(signal.SIGINT, handler)


class LocalQueue(Queue):
    """Jobs on this machine.

    Args:
        *arguments: Those of `Queue`.
        options: Options of the launcher.
    """

    cancel_command = "kill"

    def __init__(self, *arguments: Any, options: dict[str, Any]) -> None:
        super().__init__(*arguments)
        check_options(options, self.jobs)
        shares = gpu_shares([job.config for job in self.jobs if job.config], options["gpus_per_node"])
        inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
        hides_gpus = options["gpus_per_node"] == 0
        self.free_slots = [",".join(share) if share or hides_gpus else inherited for share in shares]  # CUDA_VISIBLE_DEVICES
        self.slots: dict[int, str | None] = {}  # of the running jobs, by their numbers
        self.command = os.getpid() if options["wait"] else None
        self.stopping = False
        log.info("%d jobs, %d at a time; sweep folder %s", len(self.jobs), len(shares), self.sweep.folder)

    def submit(self) -> None:
        while self.waiting and self.free_slots:
            job, slot = self.waiting.popleft(), self.free_slots.pop(0)
            submission = LocalSubmission(job.config, job.path, job.composed, git_state(), slot, self.command)
            with detached(self.sweep.folder / "submitit.log"), private_pickles(self.executor.folder):
                submitted = self.executor.submit(self.worker, submission)
            submitted.paths.result_pickle.unlink(missing_ok=True)  # of a process that had the same id long ago
            self.slots[job.number] = slot
            self.register(job, submitted)
            job.state = "running"
            self.sweep.save(self.jobs)
            self.report(job)
        if self.command is None:
            self.print_jobs()

    def poll(self, jobs: list[Job]) -> None:
        for job in jobs:
            if self.submitted[job.number].done():
                job.state, job.reason = self.outcome(job)
                self.free_slots.append(self.slots.pop(job.number))

    def outcome(self, job: Job) -> tuple[str, str]:
        """Return the state and the reason of a job whose process has ended."""
        return state_of(self.outcomes(job)) or (("stopped", "stopped by a signal") if self.stopping else KILLED)

    def stop(self) -> None:
        """Let every running job save its state and end, and start no further jobs."""
        self.stopping = True
        log.info("stopping: running jobs save their state and end; a second Ctrl-C kills them")
        for job in self.running:
            self.send(job, signal.SIGTERM)  # which submitit's process passes on

    def kill(self) -> None:
        self.stopping = True
        for job in self.running:
            self.send(job, signal.SIGKILL)
            self.submitted[job.number].wait()

    def send(self, job: Job, number: signal.Signals) -> None:
        """Send a signal to the process of submitit that watches a job; SIGKILL also to all processes of the job."""
        try:
            controller = psutil.Process(int(self.submitted[job.number].job_id))
            processes = [controller, *(controller.children(recursive=True) if number == signal.SIGKILL else [])]
        except psutil.NoSuchProcess:  # it has ended in the meantime
            return
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def update_from_processes(jobs: list[Job]) -> None:
    """Set the states of the jobs on this machine that are listed as running but have ended, in case no command follows them."""
    for job in jobs:
        if job.state == "running" and not job.slurm_id and job.log and not is_running(job):
            job.state, job.reason = saved_outcome(job) or KILLED


def is_running(job: Job) -> bool:
    """Return whether a job still works: its run is locked, or the process of submitit that watches it exists."""
    if job.folder and (job.folder / ".lock").exists():
        with try_lock(job.folder) as is_free:
            if not is_free:
                return True
    log_file = job.log.resolve() if job.log else Path()
    try:
        command = psutil.Process(int(log_file.name.partition("_")[0])).cmdline()
    except (ValueError, psutil.Error):
        return False
    return any(str(log_file.parent) in word for word in command)
