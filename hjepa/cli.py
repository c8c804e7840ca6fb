"""The command line: `hjepa [group=option] [key=value]`, or `python launch.py ...` in a checkout.

Hydra composes the config from conf/ and the arguments; `hjepa.config.run` checks it and runs its task. Imports happen inside the
functions: first the handler for Ctrl-C is installed, and torch is imported only after the config has been checked.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Train, evaluate and visualize hierarchical JEPAs on images.

Usage: {program} [group=option] [key=value] ...

Examples:
  {program} dataset=image_folder dataset.root=path/to/images train.epochs=50 name=photos
  {program} task=evaluate run=outputs/default/photos
  {program} --multirun levels=whole,views seed=0,1
  {program} task=evaluate --help        (the options of a task)

docs/configuration.md explains the groups; comments in conf/GROUP/OPTION.yaml explain the keys.

== Options: choose one of each group with group=option ==

{groups}

== Config: change any value with key=value, as in train.epochs=10 ==

{config}
Flags, such as --multirun, --cfg job and --config-dir: {program} --hydra-help"""


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
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures are only saved; in a notebook, its own backend stays
    if sys.argv[1:] == ["--version"]:
        from hjepa import __version__

        print(f"hjepa {__version__}")
    elif {"--help", "-h"} & set(sys.argv):
        print_help()
    else:
        try:
            run_hydra()
        except KeyboardInterrupt:  # outside of a task, which handles it by itself
            print("Interrupted.", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


def exit_before_start(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C during the imports and the composition of the config, before anything is written.

    The process ends without unwinding: an exception would surface as a traceback of whichever library is being imported.
    """
    os.write(2, b"Interrupted before anything was started.\n")
    os._exit(128 + number)


def run_hydra() -> None:
    """Compose the config and run its task, or do what Hydra's own flags ask for."""
    import hydra

    from hjepa.config.arguments import arrange
    from hjepa.config.cli_errors import friendly_cli_errors
    from hjepa.config.paths import CONF

    with friendly_cli_errors():
        sys.argv[1:] = arrange(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run_task)()


def run_task(cfg: "DictConfig") -> float | None:
    """Check a composed config and run its task."""
    from hjepa.config.errors import UserError
    from hjepa.config.instantiate import build
    from hjepa.config.passwords import hide_passwords
    from hjepa.config.run import perform, prepare

    try:
        config, path = prepare(cfg)
        build(config["task"])  # imports torch
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, Ctrl-C lets the task clean up
        return perform(config, path)
    except UserError as error:
        sys.exit(hide_passwords(str(error)))


def print_help() -> None:
    """Print the options of all groups and the config of the command; Hydra's own help takes several times as long."""
    from omegaconf import OmegaConf, open_dict

    from hjepa.config.arguments import without_sweep
    from hjepa.config.compose import compose_config, list_options
    from hjepa.config.errors import UserError
    from hjepa.config.paths import PROGRAM

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    known, others = parser.parse_known_args()
    overrides = [argument for argument in others if not argument.startswith("-")]
    try:
        overrides = without_sweep(overrides) if {"--multirun", "-m"} & set(others) else overrides
        config = compose_config(overrides, known.config_dir)
    except UserError as error:
        sys.exit(str(error))
    with open_dict(config):
        del config["hydra"], config["choices"]
    groups = "\n".join(f"{group}: {', '.join(options)}" for group, options in list_options(known.config_dir).items())
    print(HELP.format(program=PROGRAM, groups=groups, config=OmegaConf.to_yaml(config)))
