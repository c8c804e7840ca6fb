"""Errors that a user can fix, each reported in one sentence without a stack trace.

`UserError` stands for mistakes in a config or in data. Errors of the machine (a full disk, no memory) are turned into one as
well, wherever a library has wrapped them. Imports nothing heavy.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from hydra.errors import CompactHydraException

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

SCRIPT_ADVICE = "In a Python script, call hjepa below `if __name__ == '__main__':`."  # which starts processes

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")

NO_COMPILER = ("InvalidCxxCompiler", "No working C++ compiler", "Failed to find C compiler")  # said by Inductor and Triton


class UserError(CompactHydraException):
    """An error that the user can fix: its message names the value, what was expected and what to do."""


class NotApplicable(UserError):
    """An error of a protocol that cannot evaluate a run; `protocol=all` leaves the protocol out instead."""


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn errors of the machine into a `UserError`, and Ctrl-C into one line and the exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("Interrupted; no file is left half-written.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except Exception as error:
        explained = explain_machine_error(error)
        if explained:
            raise explained from error
        raise


def explain_machine_error(error: BaseException) -> UserError | None:
    """Return a `UserError` for an error that the machine caused, also if a library wrapped it; None for any other error."""
    if isinstance(error, UserError):
        return None
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            where = f" ({cause.filename})" if cause.filename else ""
            return UserError(
                f"A file could not be written{where}: {cause.strerror}. Free some space, or use a larger disk, and repeat the "
                "command; a training run continues from its last checkpoint."
            )
        if isinstance(cause, PermissionError) and cause.filename:
            return UserError(
                f"{os.fsdecode(cause.filename)} cannot be accessed ({cause.strerror}); change its permissions, or choose another "
                "place."
            )
        if isinstance(cause, MemoryError | RuntimeError | OSError) and is_out_of_memory(cause):
            return UserError(
                f"Out of memory ({first_line(cause)}). Training: hardware.activation_checkpointing=true continues this run; a "
                "new one needs less with a smaller train.batch_size, train.accumulate=2 or more (contrastive losses and batch "
                "norms then see one part of a batch at a time), or a smaller model. Features: a smaller task.batch_size. Probes "
                "of an evaluation: a smaller task.train_images, or hardware=cpu."
            )
        if lacks_compiler(cause):
            return UserError(
                f"hardware.compile=true needs a C++ compiler, and none was found ({first_line(cause)}); install one, such as "
                "g++, or add hardware.compile=false, which also continues a training run."
            )
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all errors that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, as reported by Python, the CPU allocator, CUDA or Metal."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in OUT_OF_MEMORY)


def lacks_compiler(error: BaseException) -> bool:
    """Return whether `torch.compile` found no compiler for its C++ code or for the launchers of Triton's kernels."""
    message = f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError) and any(words in message for words in NO_COMPILER)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ")


def import_optional(package: str, option: str, instead: str) -> Any:
    """Import a package that only one option needs.

    Args:
        package: Dotted path of the module.
        option: The option that needs it, for the error message.
        instead: What to do without the package, for the error message.

    Raises:
        UserError: The package is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"{option} needs the package {name}; pip install {name}, or {instead}.") from None
