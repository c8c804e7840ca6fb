"""A submitted job: the config of one run, fixed at submission and pickled, and how a process of submitit performs it.

The code, however, is read when the job starts. If it has changed since the submission, the run logs a warning and is tagged.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig

from hjepa.config.identity import BENCHMARK, TRAINING
from hjepa.config.run import perform
from hjepa.config.schema import Config
from hjepa.tracking.provenance import SUBMITTED_VARIABLE
from hjepa.training.signals import requeue_privately

log = logging.getLogger(__name__)

STOPPED = "stopped"  # what a job returns that saved its state after a stop signal

STOPPED_STATUS = 128 + signal.SIGINT  # exit status of such a run

REQUEUED_STATUS = 144  # exit status of a local job that submitit starts again


@dataclass
class Submission:
    """One job, as a process of a cluster performs it.

    Attributes:
        config: The resolved and checked config.
        folder: The run folder.
        composed: The config as composed by Hydra, including the `hydra` node.
        code: State of the code at submission; see `hjepa.tracking.provenance.git_state`.
    """

    config: Config
    folder: Path
    composed: DictConfig
    code: dict[str, str]

    def run(self) -> float | str | None:
        """Perform the task of the config."""
        requeue_privately()
        HydraConfig.instance().set_config(self.composed)
        configure_log(self.composed.hydra.job_logging, self.composed.hydra.verbose)
        logging.getLogger("submitit").propagate = False  # it has a handler of its own
        os.environ[SUBMITTED_VARIABLE] = json.dumps(self.code)
        own_run = self.config["task"]["_target_"] in (TRAINING, BENCHMARK)  # other tasks add to the trackers of a run
        if own_run and "wandb" not in self.config["tracking"]:
            sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]  # timm would import it, which takes over a second
        return perform(self.config, self.folder)


@dataclass
class LocalSubmission(Submission):
    """One job on this machine, which ends with the process that started it.

    Attributes:
        gpus: Value of CUDA_VISIBLE_DEVICES. None: the variable is not set.
        command: Process id of the launching command. None: the job goes on without it.
    """

    gpus: str | None
    command: int | None

    def run(self) -> float | str | None:
        """Perform the task of the config, and return `STOPPED` if a signal stopped it."""
        os.setpgrp()  # a Ctrl-C in the terminal reaches only the launching command, which passes it on once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        stop_when_orphaned([os.getppid(), *([self.command] if self.command else [])])
        try:
            return super().run()
        except SystemExit as end:
            if end.code == REQUEUED_STATUS:
                raise
            if end.code == STOPPED_STATUS:
                return STOPPED
            raise RuntimeError(f"exit status {end.code}") from None


def stop_when_orphaned(pids: list[int]) -> None:
    """Send SIGTERM to this process when one of the given processes has ended, so that the run saves its state and ends."""
    try:
        processes = [psutil.Process(pid) for pid in pids]
    except psutil.NoSuchProcess:
        raise SystemExit(STOPPED_STATUS) from None

    def watch() -> None:
        while all(is_alive(process) for process in processes):
            time.sleep(1)
        log.warning("the launching command was killed; this job saves its state and ends")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs, and not another one with its id."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
