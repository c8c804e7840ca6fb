"""Stopping politely: a signal sets a flag, the loop saves after its step, the run ends as stopped or goes back into the queue.

INT (Ctrl-C) and TERM stop a run. Under SLURM, TERM also announces that the scheduler is about to take the node (preemption,
`scontrol requeue`, `scancel`), and decides itself whether the job starts again: the run must not end before it is killed, or its
job would count as failed. USR2 comes some time before the time limit: submitit's handler then queues the job again.
"""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

GRACE_SECONDS = 3600  # longer than a scheduler lets a job live that it has told to end


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class StopFlag:
    """`with StopFlag() as stop:` and, in the loop, `if stop:`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        submitted = callable(signal.getsignal(signal.SIGUSR2))
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR2] if submitted else [])):
            self.before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number  # a requeue is followed by SIGTERM

    def __bool__(self) -> bool:
        return bool(self.number)

    @property
    def requeue(self) -> bool:
        """Whether the job was asked to go back into the queue."""
        return self.number == signal.SIGUSR2

    def agree(self, requeue: bool) -> None:
        """What any process of the run was asked for holds for all of them."""
        self.number = signal.SIGUSR2 if requeue else self.number or signal.SIGTERM

    def leave(self) -> None:
        """After the run has saved and said so: let submitit queue the job again, or SLURM end it; elsewhere nothing is left.

        Raises:
            SystemExit: the job is in the queue again.
            submitit.core.utils.UncompletedJobError: it may not be.
        """
        if self.requeue:
            self.before[signal.SIGUSR2](signal.SIGUSR2, None)
        if self.number != signal.SIGINT and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            time.sleep(GRACE_SECONDS)
