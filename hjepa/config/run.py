"""Run the task of a config: check the config, name the run folder, call the task."""

import os
import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hjepa.config.arguments import check_options_are_read
from hjepa.config.errors import friendly_errors
from hjepa.config.instantiate import build
from hjepa.config.passwords import hide_passwords, hide_passwords_in_logs
from hjepa.config.paths import PROGRAM
from hjepa.config.run_path import run_path
from hjepa.config.schema import Config, check, resolve
from hjepa.config.targets import allow_targets_of_command_line

COMMAND = "HJEPA_COMMAND"  # environment variable: the command line of a run, for its summary


def run(cfg: DictConfig) -> float | None:
    """Check a composed config and run its task; mistakes in the config are reported before torch is imported."""
    config, path = prepare(cfg)
    return perform(config, path)


def prepare(cfg: DictConfig) -> tuple[Config, Path]:
    """Return a composed config as checked plain data, and the folder of the run that it names."""
    import_from_working_directory()
    hydra = HydraConfig.get()
    allow_targets_of_command_line(hydra.runtime)
    check_options_are_read(hydra.runtime.choices.get("task"), hydra.overrides.task)
    config = resolve(cfg)
    check(config)
    return config, run_path(config)


def perform(config: Config, path: Path) -> float | None:
    """Run the task of a checked config.

    Raises:
        UserError: The machine failed (a full disk, no memory), or the task refused an option.
    """
    import_from_working_directory()
    record_command()
    hide_passwords_in_logs()
    with friendly_errors():
        result: float | None = build(config["task"])(config, path)
    return result


def import_from_working_directory() -> None:
    """Let the classes of a user's own package be imported from the folder in which the command was typed.

    The folder comes last, so that none of its files hides an installed module.
    """
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)


def record_command() -> None:
    """Record the command line of the run (in a sweep, that of the job) for the process that writes the summary."""
    if not HydraConfig.initialized():  # the run was started by `hjepa.train`
        os.environ.pop(COMMAND, None)
        return
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    words = [word for folder in folders for word in ("--config-dir", folder)]
    words += [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
    words += [override for override in hydra.overrides.task if not override.startswith("+sweeps=")]
    os.environ[COMMAND] = f"{PROGRAM} {shlex.join(map(hide_passwords, words))}".rstrip()
