"""Where the processes of a run come from: torchrun and SLURM start them, otherwise the run starts them itself.

One process fails, all end, and its sentence is the run's.
"""

import logging.config
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from hjepa.config.errors import UserError, friendly_errors
from hjepa.config.schema import Config
from hjepa.tracking.run_folder import RunFolder

Task = Callable[[Config, Path], float | None]

GRACE = 20  # seconds that the others have to write what they know when one process has failed


def launch(task: Task, config: Config, path: Path) -> float | None:
    """Run a task in as many processes as `hardware.processes` says; this is one of them if they are there already.

    Raises:
        UserError: the sentence of the process that failed first.
    """
    count = config["hardware"]["processes"]
    if count is not None and count < 1:
        raise UserError(f"hardware.processes={count}: expected at least 1, or null for one per GPU.")
    if count == 1 or "RANK" in os.environ:
        return task(config, path)
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        adopt_slurm()
        return task(config, path)
    count = count or gpus()
    return task(config, path) if count == 1 else start(task, config, path, count)


def gpus() -> int:
    """CUDA devices that this process may use, at least 1."""
    import torch

    return max(1, torch.cuda.device_count())


def adopt_slurm() -> None:
    """Describe SLURM's tasks as torchrun does."""
    from submitit.helpers import TorchDistributedEnvironment

    tasks = TorchDistributedEnvironment()
    if int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) == 1:
        tasks.master_addr = "127.0.0.1"
    else:
        try:
            socket.gethostbyname(tasks.master_addr)
        except OSError:  # an unresolvable name would cost minutes and then fail
            tasks.master_addr = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    tasks.export(set_cuda_visible_devices=False)


def start(task: Task, config: Config, path: Path, count: int) -> float | None:
    """Start the processes, pass them the signals that this one gets, and wait for all."""
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    reports = multiprocessing.get_context("spawn").SimpleQueue()
    loggers = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    arguments = (task, config, path, count, free_port(), loggers, reports)
    processes = start_processes(rank, arguments, nprocs=count, join=False, start_method="spawn")

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in processes.pids():
            os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not processes.join(grace_period=GRACE):
            pass
    except ProcessExitedException as error:
        died = f"Process {error.error_index} of {count} died ({error}); the same command continues the run."
        reason = died if reports.empty() else reports.get()
        note_failure(config, path, reason)
        raise UserError(reason) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code, result = reports.get()
    return sys.exit(code) if code else result


def rank(number: int, task: Task, config: Config, path: Path, count: int, port: int, loggers: Any, reports: Any) -> None:
    """One process: the main one reports the result, any of them a failure."""
    os.setpgrp()  # a Ctrl-C in the terminal is passed on by the parent, once
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    logging.config.dictConfig(loggers)
    report: tuple[int, float | None] = (0, None)
    try:
        with friendly_errors():
            report = (0, task(config, path))
    except UserError as error:
        reports.put(str(error))
        sys.exit(1)
    except SystemExit as stopped:
        report = (int(stopped.code or 0), None)
    if number == 0:
        reports.put(report)


def note_failure(config: Config, path: Path, reason: str) -> None:
    """Put the reason into the summary, which the main process may not have lived to write."""
    folder = RunFolder(path, config)
    if path.is_dir():
        folder.write_summary(folder.summary() | {"status": "failed", "reason": reason})


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
