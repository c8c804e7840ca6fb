"""Stopping politely: Ctrl-C and SIGTERM set a flag, the loop saves after its step and ends the run as stopped."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class StopFlag:
    """`with StopFlag() as stop:` and, in the loop, `if stop:`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def __bool__(self) -> bool:
        return bool(self.number)
