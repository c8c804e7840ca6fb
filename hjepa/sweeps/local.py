"""The local launcher: runs the jobs of a sweep on this machine, at most `hardware.slots` of them at a time.

Each job is a process. On Linux, the processes are forked from one server process that has imported torch and all modules of the
jobs but has computed nothing, so that a job starts quickly and shares this memory. The processes are otherwise independent: a
job gives the same result as when it is run alone, and a killed job harms no other. The output of a job goes to a log file in
the sweep folder.
"""

import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log
from omegaconf import DictConfig

from hjepa.config.errors import UserError
from hjepa.config.paths import PROGRAM
from hjepa.config.run import perform
from hjepa.config.schema import Config
from hjepa.config.targets import iter_targets
from hjepa.distributed.resources import gpus, num_cores
from hjepa.sweeps.job import Job
from hjepa.sweeps.plan import plan_jobs
from hjepa.sweeps.sweep import Sweep
from hjepa.sweeps.tables import default_metric, format_value, label_of, lookup
from hjepa.training.signals import StopFlag

log = logging.getLogger(__name__)

STOPPED_STATUS = 128 + signal.SIGINT  # exit status of a run that saved its state after a stop signal


def launch(loader: ConfigLoader, sweep_config: DictConfig, overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Run the jobs of a sweep; see `hydra.plugins.launcher.Launcher.launch`.

    Args:
        loader: Hydra's config loader.
        sweep_config: The config of the whole sweep.
        overrides: Overrides of each job.
        first: Number of the first job.

    Raises:
        UserError: The machine has too few cores or GPUs for the slots, or jobs failed.
        SystemExit: The sweep was stopped.
    """
    configure_log(sweep_config.hydra.hydra_logging, sweep_config.hydra.verbose)
    jobs = plan_jobs(loader, sweep_config, overrides, first)
    sweep = Sweep(Path(sweep_config.hydra.sweep.dir).expanduser().absolute())
    pool = LocalPool(sweep, jobs)
    sweep.save(jobs)
    stopped = pool.run()
    sweep.summarize(jobs)
    if stopped:
        print("Stopped. The same command continues the sweep.", file=sys.stderr)
        raise SystemExit(STOPPED_STATUS)
    return sweep.job_returns(jobs)


def gpu_shares(configs: list[Config]) -> list[list[str]]:
    """Return the GPUs of every slot; raise a UserError if the machine has too few cores or GPUs for the slots."""
    hardware_options = [config["hardware"] for config in configs]
    slots = max((hardware["slots"] for hardware in hardware_options), default=1)
    if len({hardware["slots"] for hardware in hardware_options}) > 1:
        raise UserError("hardware.slots differs between the jobs; set one number for the whole sweep.")
    threads = max(((hardware["threads"] or 1) * (hardware["processes"] or 1) for hardware in hardware_options), default=1)
    if slots < 1 or (slots > 1 and slots * threads > num_cores()):
        raise UserError(
            f"hardware.slots={slots} with {threads} threads each: expected 1 to {max(1, num_cores() // threads)} slots on the "
            f"{num_cores()} cores of this machine."
        )
    available = gpus()
    if slots > len(available) > 0 and any(hardware["device"] in ("cuda", "auto") for hardware in hardware_options):
        raise UserError(f"hardware.slots={slots}: every slot needs a GPU of its own, and this machine has {len(available)}.")
    size = len(available) // slots
    return [available[slot * size : (slot + 1) * size] for slot in range(slots)]


@dataclass
class RunningJob:
    """A job, its slot and its process."""

    job: Job
    slot: int
    process: BaseProcess
    connection: Connection  # receives the reason of a failure
    started_at: float


class LocalPool:
    """Starts jobs in order, as many at a time as there are slots."""

    def __init__(self, sweep: Sweep, jobs: list[Job]) -> None:
        self.sweep, self.jobs = sweep, jobs
        self.gpu_shares = gpu_shares([job.config for job in jobs if job.config])
        self.free_slots = list(range(len(self.gpu_shares)))
        self.running: dict[int, RunningJob] = {}
        self.stopping = False
        # On macOS, libraries break in a forked process, so every job imports its modules itself.
        self.context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")

    def run(self) -> bool:
        """Run all jobs, and return whether the sweep was stopped before their end."""
        waiting = deque(job for job in self.jobs if not job.is_done)
        log.info("%d jobs, %d at a time; sweep folder %s", len(self.jobs), len(self.gpu_shares), self.sweep.folder)
        for job in self.jobs:
            if job.state == "FAILED":
                log.info("job %d FAILED: %s", job.number, job.reason)
            elif job.is_done:
                log.info("job %d was finished before: %s", job.number, job.folder)
        if waiting:
            self.start_server([job.config for job in waiting])
        try:
            with StopFlag() as stop:
                while self.running or (waiting and not stop):
                    while waiting and self.free_slots and not stop:
                        self.start(waiting.popleft())
                    if stop and not self.stopping:
                        self.stop(signal.SIGTERM)
                    for sentinel in wait(list(self.running), timeout=0.5):
                        self.collect(self.running.pop(sentinel))  # type: ignore[arg-type]
        except KeyboardInterrupt:  # the second one
            self.stop(signal.SIGKILL)
            for running in self.running.values():
                self.collect(running)
        return self.stopping

    def start_server(self, configs: list[Config]) -> None:
        """Start the server process, which imports the modules of all targets, and from which the jobs are forked."""
        if sys.platform != "linux":
            return
        modules = {node["_target_"].rpartition(".")[0] for config in configs for _, node in iter_targets(config)}
        self.context.set_forkserver_preload(["hjepa.tasks.train", *sorted(modules)])
        # The server process of older Python versions does not know this process's sys.path.
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        resource_tracker.ensure_running()  # its start would unblock the signals again
        # The server inherits this mask, since a SIGTERM to the whole process group must not end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def start(self, job: Job) -> None:
        """Start a job in a free slot."""
        slot = self.free_slots.pop(0)
        job.log, job.state, job.reason = self.sweep.folder / f"{job.number}.log", "running", ""
        connection, job_connection = self.context.Pipe(duplex=False)
        arguments = (job, self.gpu_shares[slot], job_connection)
        process = self.context.Process(target=run_job, args=arguments, name=f"job {job.number}")
        process.start()
        job_connection.close()
        self.running[process.sentinel] = RunningJob(job, slot, process, connection, time.monotonic())
        log.info("job %d started: %s (log %s)", job.number, label_of(self.jobs, job), job.log)
        self.sweep.save(self.jobs)

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to every running job, which makes it save and end or kills it, and start no further jobs."""
        self.stopping = True
        log.info("stopping: running jobs save their state and end; a second Ctrl-C kills them")
        for running in self.running.values():
            if running.process.is_alive() and running.process.pid:
                os.kill(running.process.pid, number)

    def collect(self, ended: RunningJob) -> None:
        """Set the state of a job that has ended, and free its slot."""
        job, process = ended.job, ended.process
        process.join()
        self.free_slots = sorted([*self.free_slots, ended.slot])
        job.state, job.reason = self.outcome(process.exitcode, ended.connection)
        ended.connection.close()
        self.sweep.save(self.jobs)
        self.sweep.refresh([job])
        metric = default_metric([job])
        result = f"{metric} {format_value(lookup(job.summary, metric), metric)}" if job.state == "finished" else job.reason
        done = sum(job.is_done for job in self.jobs)
        seconds = time.monotonic() - ended.started_at
        log.info("job %d %s after %.0f s (%d of %d): %s", job.number, job.state, seconds, done, len(self.jobs), result)

    def outcome(self, status: int | None, connection: Connection) -> tuple[str, str]:
        """Return the state and the reason from the exit status of a process and the message that it sent."""
        if status == 0:
            return "finished", ""
        if status == STOPPED_STATUS or (self.stopping and status in (-signal.SIGTERM, -signal.SIGKILL)):
            return "stopped", "stopped by a signal"
        if status is not None and status < 0:
            return "FAILED", f"killed by {signal.Signals(-status).name}"
        try:
            return "FAILED", connection.recv() if connection.poll() else f"exit status {status}"
        except EOFError:
            return "FAILED", f"exit status {status}"


def run_job(job: Job, gpus: list[str], connection: Connection) -> None:
    """Run a job in its own process: redirect the output to the log file, perform the task, and send the reason of a failure."""
    assert job.log is not None
    assert job.folder is not None
    os.setpgrp()  # a Ctrl-C in the terminal reaches only the launcher, which passes it on once
    redirect_output(job.log)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    stop_with_parent()
    HydraConfig.instance().set_config(job.composed)
    configure_log(job.composed.hydra.job_logging, job.composed.hydra.verbose)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    print(f"{PROGRAM} hydra.mode=RUN {shlex.join(job.overrides)}")
    try:
        perform(job.config, job.folder)
    except UserError as error:
        print(error, file=sys.stderr)
        connection.send(str(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(STOPPED_STATUS) from None
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def redirect_output(file: Path) -> None:
    """Write everything that this process and its libraries print to a file, line by line."""
    with file.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def stop_with_parent() -> None:
    """Send SIGTERM to this process when the launcher has ended, so that the run saves its state and ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
