"""Faults of the machine in one sentence: no space left, no memory left. Nothing heavy is imported to tell them."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from hjepa.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What the machine is to blame for is raised as a `UserError`, a Ctrl-C ends the process with a word, anything else is
    raised as it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("Interrupted; nothing of what was begun is left half-written.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except Exception as error:
        sentence = explain(error)
        if sentence:
            raise sentence from error
        raise


def explain(error: BaseException) -> UserError | None:
    """The sentence for an error, also where a library has wrapped it; None for what is not the machine's fault."""
    if isinstance(error, UserError):
        return None
    for cause in chain(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            where = f" ({cause.filename})" if cause.filename else ""
            return UserError(
                f"A file could not be written{where}: {cause.strerror}. Free some space, or move output_root to a larger disk; "
                "the same command then continues the run from its last checkpoint."
            )
        if isinstance(cause, MemoryError | RuntimeError | OSError) and lacks_memory(cause):
            return UserError(
                f"Out of memory ({first_line(cause)}). Continue this run with hardware.activation_checkpointing=true, or start "
                "one that takes less: train.accumulate=2 or more, a smaller train.batch_size, a smaller model."
            )
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, the CPU allocator's, CUDA's or Metal's."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY)


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ")
