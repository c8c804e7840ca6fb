"""Mistakes in a command line, reported in one sentence that suggests the nearest option."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import CompactHydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from hjepa.config.errors import UserError
from hjepa.config.paths import CONF

FULL_ERROR = "HYDRA_FULL_ERROR"  # environment variable: if set, Hydra prints stack traces


@contextmanager
def friendly_cli_errors() -> Iterator[None]:
    """End the process with one sentence and the exit status 1 on a mistake, unless HYDRA_FULL_ERROR is set."""
    if FULL_ERROR in os.environ:
        yield
        return
    os.environ[FULL_ERROR] = "1"  # otherwise Hydra prints its own message and exits
    try:
        yield
    except CompactHydraException as error:
        print(format_hydra_error(error), file=sys.stderr)
        sys.exit(1)
    finally:
        del os.environ[FULL_ERROR]


def format_hydra_error(error: CompactHydraException) -> str:
    """Return one sentence that says what is wrong and what was probably meant."""
    cause = error.__cause__
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        reason = error.message.splitlines()[0]
        return f"{error.override} cannot be parsed ({reason}); write key=value, in quotes for the shell: 'key=[1,2]'."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        # Hydra does not know the options of lists such as tracking=[mlflow]
        options = error.options or [file.stem for file in (CONF / group).glob("[!_]*.yaml")]
        return f"{group}={option} is not an option{suggest(option, list(options))}"
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None and "not in struct" in str(cause):
        path, key = str(cause.full_key), str(cause.key)
        return f"{path} is not an option{suggest(key, [str(name) for name in cause.parent_node])}"
    message = " ".join(f"{error} {cause or ''}".split())
    if isinstance(error, InstantiationException):
        return f"{message} (set {FULL_ERROR}=1 for the stack trace)"
    return message


def suggest(word: str, options: list[str]) -> str:
    """Return the end of a sentence that names the option nearest to a word, and all options."""
    names = sorted(set(options) - {"_target_", "hydra"})
    nearest = get_close_matches(word, names, n=1)
    return (f"; did you mean {nearest[0]}?" if nearest else ".") + f" The options are {', '.join(names)}."
