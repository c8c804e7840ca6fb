"""What a person has mistyped on the command line, in one sentence; Hydra says it in several lines, without the nearest match."""

import contextlib
import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches

from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from hjepa.errors import UserError

FULL = "HYDRA_FULL_ERROR"


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """Ends the process with a sentence for a mistake; where HYDRA_FULL_ERROR is set, Hydra says it its own way."""
    if FULL in os.environ:
        yield
        return
    os.environ[FULL] = "1"  # else Hydra prints and exits itself
    try:
        yield
    except CompactHydraException as error:
        print(sentence(error), file=sys.stderr)
        sys.exit(1)
    finally:
        del os.environ[FULL]


def sentence(error: CompactHydraException) -> str:
    """What is wrong, and what was probably meant."""
    cause = error.__cause__
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        what = error.message.splitlines()[0]
        return f"{error.override} cannot be read ({what}); write key=value, in quotes for the shell: 'key=[1,2]'."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} is no option{meant(option, list(error.options))}"
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None and "not in struct" in str(cause):
        path, key = str(cause.full_key), str(cause.key)
        return f"{path} is no option{meant(key, [str(name) for name in cause.parent_node])}"
    return " ".join(f"{error} {cause or ''}".split())


def meant(word: str, there: list[str]) -> str:
    """The nearest of the words that there are, and all of them."""
    words = sorted(set(there) - {"_target_", "hydra"})
    near = get_close_matches(word, words, n=1)
    return (f"; did you mean {near[0]}?" if near else ".") + f" There are {', '.join(words)}."
