"""The config that a run folder holds."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.upgrade import upgrade_config


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a run folder as plain data, without resolving or instantiating any of it."""
    file = folder / "config.yaml"
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise UserError(f"{file} cannot be read as a config ({type(error).__name__}); choose the folder of a run.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no config; choose the folder of a run.")
    return upgrade_config(config)
