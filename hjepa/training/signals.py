"""Graceful stops: a signal sets a flag, the training loop saves after its step, and the run ends as stopped or is requeued.

INT (Ctrl-C) and TERM stop a run. Under SLURM, TERM announces that the scheduler is about to take the node away (preemption,
`scontrol requeue`, `scancel`). The scheduler then decides whether the job starts again, so the process must not exit before it
is killed, or the job would count as failed. USR2 arrives some time before the time limit; submitit's handler for it requeues the
job.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

GRACE_SECONDS = 3600  # longer than a scheduler waits between its TERM and its KILL


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Let only their owner read new files: submitit writes the config, which may contain passwords, to a file at a requeue."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)


def requeue_privately() -> None:
    """Let submitit's handler of USR2, if this process has it, write the config of its job for the owner only."""
    handler = signal.getsignal(signal.SIGUSR2)

    def handle(number: int, frame: FrameType | None) -> None:
        with private_files():
            handler(number, frame)  # type: ignore[operator, misc]

    if callable(handler):
        signal.signal(signal.SIGUSR2, handle)


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class StopFlag:
    """A context manager that is true once a stop signal has arrived; a second Ctrl-C interrupts at once.

    Usage: `with StopFlag() as stop:` around the loop, and `if stop:` inside it.
    """

    def __init__(self) -> None:
        self.number = 0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
            return self
        under_submitit = callable(signal.getsignal(signal.SIGUSR2))
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR2] if under_submitit else [])):
            self.previous_handlers[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; raise `KeyboardInterrupt` for a Ctrl-C after another signal."""
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number  # the TERM that follows a USR2 must not replace it

    def __bool__(self) -> bool:
        return bool(self.number)

    @property
    def requeue(self) -> bool:
        """Whether the job was asked to requeue itself."""
        return self.number == signal.SIGUSR2

    def adopt(self, requeue: bool) -> None:
        """Adopt a stop request that any process of the run has received."""
        self.number = signal.SIGUSR2 if requeue else self.number or signal.SIGTERM

    def leave(self) -> None:
        """Hand the job back to the scheduler after the run has been saved: requeue it, or wait for SLURM to end it.

        Without a scheduler, this returns at once.

        Raises:
            SystemExit: The job has been requeued.
            submitit.core.utils.UncompletedJobError: The job may not be requeued again.
        """
        if self.requeue:
            with private_files():
                self.previous_handlers[signal.SIGUSR2](signal.SIGUSR2, None)
        if self.number != signal.SIGINT and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            time.sleep(GRACE_SECONDS)
