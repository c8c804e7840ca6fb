"""Mistakes in a command line, reported in one sentence that suggests the nearest option."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import CompactHydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hjepa.config.arguments import swept_groups
from hjepa.config.errors import UserError
from hjepa.config.paths import CONF
from hjepa.config.quoting import correct, find_choice_of_no_option, other_forms

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
    except (CompactHydraException, ValueError) as error:
        print(format_hydra_error(error, sys.argv[1:]), file=sys.stderr)
        sys.exit(1)
    finally:
        del os.environ[FULL_ERROR]


def format_hydra_error(error: CompactHydraException | ValueError, arguments: Sequence[str]) -> str:
    """Return one sentence that says what is wrong and what was probably meant.

    Args:
        error: The error.
        arguments: All arguments of the command.

    Raises:
        ValueError: The error is a `ValueError` that has nothing to do with the arguments.
    """
    cause, message = error.__cause__, str(error)
    if isinstance(error, ValueError):  # Hydra raises one for flags that exclude each other, and for a group without an option
        if message.startswith("Only one of --run, --multirun, --cfg, --info"):
            if not {"--multirun", "-m"} & set(arguments):
                return f"{message}; leave the others out."
            return "--cfg and --info show one config; leave --multirun out and give each swept key one value."
        groups = [folder.name for folder in CONF.iterdir()]
        argument = find_choice_of_no_option(arguments, groups) if message.startswith("Config group override") else None
        if argument is None:
            raise error
        return f"{argument} chooses no option of a config group; write group=option, as in model=vit_tiny."
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        if corrected := correct(error.override, arguments):
            return f"{error.override} cannot be parsed as it is; write {corrected}"
        return f"{error.override} cannot be parsed; write group=option or key=value, in quotes for the shell: 'key=[1,2]'."
    if ambiguous := re.match(r"Ambiguous value for argument '(.*)'$", message.strip().partition("\n")[0]):
        return f"{ambiguous[1]} has several values; add --multirun to try each{other_forms(ambiguous[1], shlex.quote)}"
    if unknown := re.match("Could not override '((?:dataset@)?protocol[^']*)'", message):
        return describe_missing_protocol(unknown[1])
    if message.startswith("Multiple values for ") and (group := message.split()[3].rstrip(".")):
        return f"{group} already has an option; write {group}=OPTION without the plus sign to choose another one."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if (group, option) == ("hydra/sweeper", "_optuna"):
            return "hydra/sweeper=optuna needs the package hydra-optuna-sweeper; pip install -e '.[optuna]'."
        # Hydra does not know the options of lists such as tracking=[mlflow]
        options = error.options or [file.stem for file in (CONF / group).glob("[!_]*.yaml")]
        name = f"{group}={option}" if group else f"--config-name={option}"
        return f"{name} is not an option{suggest(option, [name for name in options if not name.startswith('_')])}"
    if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None and re.match("Key .* not in ", str(cause)):
        path, key = str(cause.full_key), str(cause.key)
        if path == "protocol":
            return describe_missing_protocol(path)
        place = swept_option(path, cause.parent_node, arguments)
        return f"{path} is not an option{place}{suggest(key, [str(name) for name in cause.parent_node])}"
    if merged := re.match("Error merging override (.*)$", message.strip()):  # a value that the launcher's schema refuses
        return f"{merged[1]}: {str(cause).partition(chr(10))[0].rstrip('.')}."
    message = " ".join(f"{message} {cause or ''}".split())
    if isinstance(error, InstantiationException):
        return f"{message} (set {FULL_ERROR}=1 for the stack trace)"
    return message


def describe_missing_protocol(key: str) -> str:
    """Return a sentence that says where protocols, or the dataset of one, are options."""
    if "@" not in key:
        return f"{key} belongs to task=evaluate; add task=evaluate and run=outputs/default/NAME."
    return f"{key} belongs to task=evaluate with the protocol of this name; add task=evaluate and 'protocol=[transfer]'."


def swept_option(path: str, node: Container, arguments: Sequence[str]) -> str:
    """Return " of group=option" if the node belongs to one of the swept options of a group; empty if it does not."""
    group, target = path.partition(".")[0], OmegaConf.select(node, "_target_")
    for option in swept_groups(arguments).get(group, []):
        file = CONF / group / f"{option}.yaml"
        if file.is_file() and f"_target_: {target}\n" in file.read_text():
            return f" of {group}={option}"
    return ""


def suggest(word: str, options: list[str]) -> str:
    """Return the end of a sentence that names the option nearest to a word, and all options if there are any."""
    names = sorted(set(options) - {"_target_", "hydra"})
    if not names:
        return "."
    nearest = get_close_matches(word, names, n=1)
    return (f"; did you mean {nearest[0]}?" if nearest else ".") + f" The options are {', '.join(names)}."
