"""The name of a tracked run, which tells it from others in its first characters, since lists and legends cut long names."""

import json
import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hjepa.config.quoting import parse

SWEPT_VARIABLE = "HJEPA_SWEPT"  # environment variable with the keys and groups that the current sweep varies


class SweptOptions(Callback):
    """Hydra callback that records which options a sweep varies, for the names of its runs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        overrides = filter(None, map(parse, config.hydra.overrides.task))
        typed = [override.key_or_group for override in overrides if override.is_sweep_override()]
        params = config.hydra.sweeper.get("params") or {}
        os.environ[SWEPT_VARIABLE] = json.dumps(list(dict.fromkeys([*typed, *map(str, params)])))


def display_name(folder: Path, params: dict[str, Any], tags: dict[str, str]) -> str:
    """Return the name of a tracked run: the seed, what its sweep varies, the hash of its config, and the name of its folder.

    A run that the user has named has the name of its folder.

    Args:
        folder: Run folder.
        params: Flattened config.
        tags: Tags of the run; `config` is the hash of its config.
    """
    if params.get("name") or "seed" not in params:
        return folder.name
    words = [f"s{params['seed']}"]
    for key in json.loads(os.environ.get(SWEPT_VARIABLE, "[]")):
        if f"choices.{key}" in params:
            words.append(str(params[f"choices.{key}"]))
        elif key in params and key != "seed":
            words.append(f"{key.rpartition('.')[2]}={params[key]}")
    return " ".join([*words, tags.get("config", "")[:4], folder.name])
