"""The one exception for mistakes a user can mend: its sentence is printed without a stack trace, and the exit code is 1."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException


class UserError(CompactHydraException):
    """One clear sentence: the value at fault, what was expected, what to do."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
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
        format_hydra_error = explain_machine_error(error)
        if format_hydra_error:
            raise format_hydra_error from error
        raise


def explain_machine_error(error: BaseException) -> UserError | None:
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


FULL_ERROR = "HYDRA_FULL_ERROR"


@contextlib.contextmanager
def friendly_cli_errors() -> Iterator[None]:
    """Ends the process with a sentence for a mistake; where HYDRA_FULL_ERROR is set, Hydra says it its own way."""
    if FULL_ERROR in os.environ:
        yield
        return
    os.environ[FULL_ERROR] = "1"  # else Hydra prints and exits itself
    try:
        yield
    except CompactHydraException as error:
        print(format_hydra_error(error), file=sys.stderr)
        sys.exit(1)
    finally:
        del os.environ[FULL_ERROR]


def format_hydra_error(error: CompactHydraException) -> str:
    """What is wrong, and what was probably meant."""
    cause = error.__cause__
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        what = error.message.splitlines()[0]
        return f"{error.override} cannot be read ({what}); write key=value, in quotes for the shell: 'key=[1,2]'."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} is no option{suggest(option, list(error.options))}"
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None and "not in struct" in str(cause):
        path, key = str(cause.full_key), str(cause.key)
        return f"{path} is no option{suggest(key, [str(name) for name in cause.parent_node])}"
    return " ".join(f"{error} {cause or ''}".split())


def suggest(word: str, there: list[str]) -> str:
    """The nearest of the words that there are, and all of them."""
    words = sorted(set(there) - {"_target_", "hydra"})
    near = get_close_matches(word, words, n=1)
    return (f"; did you mean {near[0]}?" if near else ".") + f" There are {', '.join(words)}."


def import_optional(package: str, option: str, instead: str) -> Any:
    """Import the package that an option needs.

    Raises:
        UserError: it is not installed; the sentence ends with what to do `instead`.
    """
    try:
        return import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"{option} needs the package {name}; pip install {name}, or {instead}.") from None
