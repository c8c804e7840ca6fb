"""What a user sees while hjepa works: progress bars, and output that survives a closed pipe."""

import io
import os
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Any = None, disable: bool = False, **options: Any) -> Any:
    """Return a tqdm progress bar that is shown in terminals and notebooks, and hidden where stderr is a file or a pipe.

    Args:
        iterable: Items to iterate over, or None for a bar that is updated by hand.
        disable: Hide the bar in any case, as in all processes but the main one.
        **options: Further arguments of `tqdm.tqdm`.
    """
    return tqdm(iterable, disable=disable or not shows_progress(), **options)


def shows_progress() -> bool:
    """Return whether stderr is a terminal or the output of a notebook cell."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


class PipeOutput(io.FileIO):
    """Standard output or standard error that discards everything after its reader has gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def survive_closed_pipes() -> None:
    """Let a run continue and save its result when the reader of its output ends early, as in `... | head`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            stream.flush()
            pipe = PipeOutput(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError, ValueError):  # a replaced or closed stream
            continue
        output: Any = pipe if stream.write_through else io.BufferedWriter(pipe)  # PYTHONUNBUFFERED asks for no buffer
        options = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
        setattr(sys, name, io.TextIOWrapper(output, write_through=stream.write_through, **options))
