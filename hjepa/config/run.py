"""From a config to a result: instantiate the parts, start or resume the run, call the task, return the sweeper's metric."""

import os
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hjepa.config.errors import friendly_errors
from hjepa.config.identity import run_path
from hjepa.config.instantiate import build
from hjepa.config.schema import Config, check, resolve


def run(cfg: DictConfig) -> float | None:
    """Run the config's task; everything that can be wrong with the config is said before torch is imported."""
    config, path = prepare(cfg)
    return perform(config, path)


def perform(config: Config, path: Path) -> float | None:
    """Run the task of a checked config; faults of the machine are told in one sentence."""
    note_command()
    with friendly_errors():
        result: float | None = build(config["task"])(config, path)
    return result


def prepare(cfg: DictConfig) -> tuple[Config, Path]:
    """The config as plain data, checked, and the folder of the run that it names."""
    config = resolve(cfg)
    check(config)
    return config, run_path(config, HydraConfig.get().runtime.choices)


COMMAND = "HJEPA_COMMAND"  # environment variable: what was typed to start a run, for the processes that share it


def note_command() -> None:
    """Keep what Hydra was asked for (of one job, in a sweep) for the summary of the run, in whichever process that is made."""
    typed = [override for override in HydraConfig.get().overrides.task if not override.startswith("+sweeps=")]
    os.environ[COMMAND] = shlex.join(["python", "launch.py", *typed])
