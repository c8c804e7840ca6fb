"""The jobs of a sweep on this machine: each a process of its own, at most `hardware.slots` of them at a time.

The processes are forked (on Linux) from one clean process that has imported what the jobs need, torch above all, and has
computed nothing: a job starts in a moment, shares that memory, and yet is alone, so it equals the same job run by itself, and
whatever kills it harms no other. What it says goes to a log file in the sweep folder.
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
from hjepa.config.run import perform
from hjepa.config.schema import Config, iter_targets
from hjepa.distributed.resources import gpus, num_cores
from hjepa.sweeps.job import Job
from hjepa.sweeps.plan import plan_jobs
from hjepa.sweeps.sweep import Sweep
from hjepa.sweeps.tables import default_metric, figure, label_of, lookup
from hjepa.training.signals import StopFlag

log = logging.getLogger(__name__)

STOPPED = 128 + signal.SIGINT  # exit status of a run that was asked to stop and saved


def launch(loader: ConfigLoader, master: DictConfig, overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Run the jobs of a sweep; see `hydra.plugins.launcher.Launcher.launch`.

    Raises:
        UserError: the slots do not fit this machine, or jobs failed; SystemExit: it was stopped.
    """
    configure_log(master.hydra.hydra_logging, master.hydra.verbose)
    jobs = plan_jobs(loader, master, overrides, first)
    sweep = Sweep(Path(master.hydra.sweep.dir).expanduser().absolute())
    slots = LocalPool(sweep, jobs)
    sweep.write(jobs)
    stopped = slots.run()
    sweep.end(jobs)
    if stopped:
        print("Stopped. The same command continues the sweep.", file=sys.stderr)
        raise SystemExit(STOPPED)
    return sweep.returns(jobs)


def gpu_shares(configs: list[Config]) -> list[list[str]]:
    """The GPUs of every slot, none without GPUs; refuses more slots than this machine can serve."""
    wanted = [c["hardware"] for c in configs]
    slots = max((hardware["slots"] for hardware in wanted), default=1)
    if len({hardware["slots"] for hardware in wanted}) > 1:
        raise UserError("hardware.slots differs between the jobs; give one number for the whole sweep.")
    threads = max(((hardware["threads"] or 1) * (hardware["processes"] or 1) for hardware in wanted), default=1)
    if slots < 1 or (slots > 1 and slots * threads > num_cores()):
        raise UserError(
            f"hardware.slots={slots} with {threads} threads each: expected 1 to {max(1, num_cores() // threads)} slots on the "
            f"{num_cores()} cores of this machine."
        )
    there = gpus()
    if slots > len(there) > 0 and any(hardware["device"] in ("cuda", "auto") for hardware in wanted):
        raise UserError(f"hardware.slots={slots}: every slot needs a GPU of its own, and there are {len(there)}.")
    size = len(there) // slots
    return [there[slot * size : (slot + 1) * size] for slot in range(slots)]


@dataclass
class RunningJob:
    """A job and its process."""

    job: Job
    slot: int
    process: BaseProcess
    answer: Connection
    began: float


class LocalPool:
    """Runs jobs in their order, as many at a time as there are slots."""

    def __init__(self, sweep: Sweep, jobs: list[Job]) -> None:
        self.sweep, self.jobs = sweep, jobs
        self.gpu_shares = gpu_shares([job.config for job in jobs if job.config])
        self.free = list(range(len(self.gpu_shares)))
        self.running: dict[int, RunningJob] = {}
        self.stopping = False
        # macOS's libraries do not survive a fork: there every job imports for itself.
        self.context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")

    def run(self) -> bool:
        """Run all jobs to their ends; returns whether it was stopped before."""
        waiting = deque(job for job in self.jobs if not job.is_done)
        log.info("%d jobs, %d at a time; sweep folder %s", len(self.jobs), len(self.gpu_shares), self.sweep.folder)
        for job in self.jobs:
            if job.state == "FAILED":
                log.info("job %d FAILED: %s", job.number, job.reason)
            elif job.is_done:
                log.info("job %d was finished before: %s", job.number, job.folder)
        if waiting:
            self.prepare([job.config for job in waiting])
        try:
            with StopFlag() as stop:
                while self.running or (waiting and not stop):
                    while waiting and self.free and not stop:
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

    def prepare(self, configs: list[Config]) -> None:
        """Start the clean process, which imports the modules of all parts."""
        if sys.platform != "linux":
            return
        modules = {node["_target_"].rpartition(".")[0] for config in configs for _, node in iter_targets(config)}
        self.context.set_forkserver_preload(["hjepa.tasks.train", *sorted(modules)])
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # older Pythons' clean process looks nowhere else
        resource_tracker.ensure_running()  # whose start would undo the next line
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited: one to the whole process group must not end it
        try:
            ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def start(self, job: Job) -> None:
        """Start a job in a free slot."""
        slot = self.free.pop(0)
        job.log, job.state, job.reason = self.sweep.folder / f"{job.number}.log", "running", ""
        answer, far = self.context.Pipe(duplex=False)
        arguments = (job, self.gpu_shares[slot], far)
        process = self.context.Process(target=work, args=arguments, name=f"job {job.number}")
        process.start()
        far.close()
        self.running[process.sentinel] = RunningJob(job, slot, process, answer, time.monotonic())
        log.info("job %d started: %s (log %s)", job.number, label_of(self.jobs, job), job.log)
        self.sweep.write(self.jobs)

    def stop(self, number: signal.Signals) -> None:
        """Ask every running job to save and end, or kill it; no further one starts."""
        self.stopping = True
        log.info("stopping: running jobs save and end; a second Ctrl-C kills them")
        for running in self.running.values():
            if running.process.is_alive() and running.process.pid:
                os.kill(running.process.pid, number)

    def collect(self, ended: RunningJob) -> None:
        """Take in how a job ended."""
        job, process = ended.job, ended.process
        process.join()
        self.free = sorted([*self.free, ended.slot])
        job.state, job.reason = self.outcome(process.exitcode, ended.answer)
        ended.answer.close()
        self.sweep.write(self.jobs)
        self.sweep.refresh([job])
        metric = default_metric([job])
        result = f"{metric} {figure(lookup(job.summary, metric), metric)}" if job.state == "finished" else job.reason
        done = sum(job.is_done for job in self.jobs)
        seconds = time.monotonic() - ended.began
        log.info("job %d %s after %.0f s (%d of %d): %s", job.number, job.state, seconds, done, len(self.jobs), result)

    def outcome(self, status: int | None, answer: Connection) -> tuple[str, str]:
        """State and reason from a process' exit status and what it said of its failure."""
        if status == 0:
            return "finished", ""
        if status == STOPPED or (self.stopping and status in (-signal.SIGTERM, -signal.SIGKILL)):
            return "stopped", "stopped by a signal"
        if status is not None and status < 0:
            return "FAILED", f"killed by {signal.Signals(-status).name}"
        try:
            return "FAILED", answer.recv() if answer.poll() else f"exit status {status}"
        except EOFError:
            return "FAILED", f"exit status {status}"


def work(job: Job, gpus: list[str], answer: Connection) -> None:
    """What a job's process does: the config's task, all output to the log file; the reason of a failure is answered."""
    assert job.log is not None
    assert job.folder is not None
    os.setpgrp()  # a Ctrl-C in the terminal is passed on by the sweep's process, once
    speak_to(job.log)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    end_with_parent()
    HydraConfig.instance().set_config(job.composed)
    configure_log(job.composed.hydra.job_logging, job.composed.hydra.verbose)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    print(f"python launch.py hydra.mode=RUN {shlex.join(job.overrides)}")
    try:
        perform(job.config, job.folder)
    except UserError as error:
        print(error, file=sys.stderr)
        answer.send(str(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(STOPPED) from None
    except Exception as error:
        traceback.print_exc()
        answer.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def speak_to(file: Path) -> None:
    """Send everything that this process and its libraries print to a file, line by line."""
    with file.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def end_with_parent() -> None:
    """Save and end as on SIGTERM when the sweep's process is gone: nobody would collect this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
