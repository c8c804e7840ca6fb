"""Start the processes of a run, unless torchrun or SLURM have started them.

If one process fails, all of them end, and the run reports the error of the one that failed first.
"""

import contextlib
import logging.config
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from hjepa.config.errors import SCRIPT_ADVICE, UserError, friendly_errors
from hjepa.config.paths import CONF
from hjepa.config.schema import Config
from hjepa.config.terminal import survive_closed_pipes
from hjepa.tracking.run_folder import RunFolder, try_lock

Task = Callable[[Config, Path], float | None]

GRACE_SECONDS = 20  # the other processes have this long to save and end after one has failed


def launch(task: Task, config: Config, path: Path) -> float | None:
    """Run a task in `hardware.processes` processes, or as one of them if they have been started already.

    Raises:
        UserError: A process failed; the message is that of the process that failed first. Or `srun` has started another number
            of tasks, or there are fewer GPUs than processes to start.
    """
    count = config["hardware"]["processes"]
    if count == 1 or "RANK" in os.environ:
        return task(config, path)
    if was_started_by_srun():
        from hjepa.distributed.slurm import adopt_slurm

        check_tasks(count, int(os.environ["SLURM_STEP_NUM_TASKS"]))
        adopt_slurm()
        return task(config, path)
    count = count or num_gpus()
    if count == 1:
        return task(config, path)
    check_gpus(count, config["hardware"]["device"])
    return start(task, config, path, count)


def num_gpus() -> int:
    """Return the number of CUDA devices that this process may use, at least 1."""
    import torch

    return max(1, torch.cuda.device_count())


def was_started_by_srun() -> bool:
    """Return whether this process is one of several tasks of `srun`, and not a job of a local sweep inside of one."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and os.environ.get("SUBMITIT_EXECUTOR") != "local"


def check_tasks(count: int | None, tasks: int) -> None:
    """Raise a UserError unless `hardware.processes`, if it is a number, is the number of tasks that `srun` has started."""
    if count not in (None, tasks):
        raise UserError(
            f"hardware.processes={count}, but srun has started {tasks} tasks, each of which is a process; make them equal, as in "
            f"`srun -n {count}` or hardware.processes={tasks}."
        )


def check_gpus(count: int, device: str) -> None:
    """Raise a UserError if processes that are started here would have to share GPUs, which NCCL refuses.

    Tasks of `srun` are not checked: each may see one GPU only, which is its own.

    Args:
        count: Number of processes.
        device: `hardware.device`.
    """
    import torch

    gpus = 0 if device in ("cpu", "mps") else torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(
            f"hardware.processes={count}: every process needs a GPU of its own, and the number of GPUs is {gpus}; "
            f"set hardware.processes={gpus}, or choose hardware=cpu."
        )


def start(task: Task, config: Config, path: Path, count: int) -> float | None:
    """Start the processes, forward SIGINT and SIGTERM to them, and wait for all."""
    from torch.distributed.elastic.utils.distributed import get_free_port
    from torch.multiprocessing.spawn import ProcessExitedException, start_processes

    reports = multiprocessing.get_context("spawn").SimpleQueue()  # which starts the resource tracker
    called_by_hydra = HydraConfig.initialized()
    logging_node = HydraConfig.get().job_logging if called_by_hydra else OmegaConf.load(CONF / "hydra/job_logging/hjepa.yaml")
    loggers = OmegaConf.to_container(logging_node, resolve=True)
    arguments = (task, config, path, count, get_free_port(), loggers, reports)
    claimed = claim_time(path)
    with blocked_interrupts():
        processes = start_processes(rank, arguments, nprocs=count, join=False, start_method="spawn")

        def forward(number: int, frame: FrameType | None) -> None:
            for pid in processes.pids():
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, number)

        is_main_thread = threading.current_thread() is threading.main_thread()  # only that one may handle signals
        previous = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)} if is_main_thread else {}
    try:
        while not processes.join(grace_period=GRACE_SECONDS):
            pass
    except ProcessExitedException as error:
        advice = "the same command continues the run." if error.signal_name else f"its output above says why. {SCRIPT_ADVICE}"
        death = f"Process {error.error_index} of {count} died ({error}); {advice}"
        reason = death if reports.empty() else reports.get()
        if claim_time(path) not in (None, claimed):
            record_failure(config, path, reason)
        raise UserError(reason) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code, result = reports.get()
    return sys.exit(code) if code else result


@contextlib.contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Block SIGINT inside of the `with` statement, also in processes that are started there until they unblock it.

    A Ctrl-C then waits until the handlers are installed, in this process, and the modules imported, in the others. The resource
    tracker of multiprocessing unblocks the signal when it starts, so that it must run before.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def rank(number: int, task: Task, config: Config, path: Path, count: int, port: int, loggers: Any, reports: Any) -> None:
    """Run the task in one process. Any process reports an error, the main process also reports the result."""
    os.setpgrp()  # so that a Ctrl-C in the terminal arrives once, from the parent
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    survive_closed_pipes()
    logging.config.dictConfig(loggers)
    report: tuple[int, float | None] = (0, None)
    try:
        with friendly_errors():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `blocked_interrupts`
            report = (0, task(config, path))
    except UserError as error:
        reports.put(str(error))
        sys.exit(1)
    except SystemExit as stopped:
        report = (int(stopped.code or 0), None)
    if number == 0:
        reports.put(report)


def claim_time(path: Path) -> int | None:
    """Return when a process has claimed a run folder last; None if it has never been claimed."""
    file = path / "config.yaml"
    return file.stat().st_mtime_ns if file.exists() else None


def record_failure(config: Config, path: Path, reason: str) -> None:
    """Write the reason of a failure into the summary, in case the main process died before it could."""
    with try_lock(path) as is_free:
        folder = RunFolder(path, config)
        summary = folder.summary()
        if is_free and summary.get("status") not in ("finished", "collapsed"):
            folder.write_summary(summary | {"status": "failed", "reason": reason})
