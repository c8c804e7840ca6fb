"""The command line: `hjepa [group=option] [key=value]`, or `python launch.py ...` in a checkout.

Hydra composes the config from conf/ and the arguments; `hjepa.config.run` checks it and runs its task. Imports happen inside the
functions: first the handler for Ctrl-C is installed, and torch is imported only after the config has been checked.
"""

import contextlib
import io
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

INTERNAL_OPTION = re.compile(r"(?<=: |, )_\w+, ")  # files that other files include, such as dataset/_common.yaml


def main(home: Path | None = None) -> None:
    """Run the command in `sys.argv`.

    Args:
        home: Folder of outputs/ and data/ if the environment variable `HJEPA_HOME` is not set. None: the current folder.
    """
    signal.signal(signal.SIGINT, exit_before_start)

    from hjepa.config.paths import path_variables
    from hjepa.config.terminal import survive_closed_pipes

    survive_closed_pipes()
    os.environ |= path_variables(home)
    if sys.argv[1:] == ["--version"]:
        from hjepa import __version__

        print(f"hjepa {__version__}")
    elif {"--help", "-h"} & set(sys.argv):
        print_help()
    else:
        run_hydra()


def exit_before_start(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C during the imports and the composition of the config, before anything is written.

    The process ends without unwinding: an exception would surface as a traceback of whichever library is being imported.
    """
    os.write(2, b"Interrupted before anything was started.\n")
    os._exit(128 + number)


def run_hydra() -> None:
    """Compose the config and run its task, or do what Hydra's own flags ask for."""
    import hydra

    from hjepa.config.cli_errors import friendly_cli_errors
    from hjepa.config.paths import CONF

    with friendly_cli_errors():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run_task)()


def run_task(cfg: "DictConfig") -> float | None:
    """Check a composed config and run its task."""
    from hjepa.config.errors import UserError
    from hjepa.config.instantiate import build
    from hjepa.config.run import perform, prepare

    try:
        config, path = prepare(cfg)
        build(config["task"])  # imports torch
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, Ctrl-C lets the task clean up
        return perform(config, path)
    except UserError as error:
        sys.exit(str(error))


def print_help() -> None:
    """Print Hydra's help without the options that only other files include."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            run_hydra()
    finally:
        print(INTERNAL_OPTION.sub("", text.getvalue()), end="")
