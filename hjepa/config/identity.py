"""The identity of a run: the part of its config that changes the result, its hash, and the run folder that it names.

The same command names the same run folder, so that starting it again continues the run instead of starting another one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from hjepa.config.errors import UserError
from hjepa.config.schema import Config

# These options may differ between two starts of one run: they change where and how it computes, not its result.
NOT_IDENTITY = (
    *("choices", "name", "experiment_name", "output_root", "run", "overwrite"),
    *("tracking", "checkpoint", "task", "hardware"),
)
NOT_IDENTITY_DATASET = ("memory_limit_gb", "workers")

LONGEST_NAME = 200  # bytes; file systems allow 255, of which `benchmark-` and temporary files need some

NAME_GROUPS = ("dataset", "model", "levels", "masking", "loss")

TRAINING, BENCHMARK = "hjepa.tasks.train_model", "hjepa.tasks.run_benchmark"  # the tasks with a run folder of their own


def identity(config: Config) -> Config:
    """Return the part of a config that changes the result of a run.

    The result of a benchmark is its speed, which also depends on the hardware, the data loading and the options of the task.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    if config["task"]["_target_"] == BENCHMARK:
        return kept | {key: config[key] for key in ("hardware", "task")}
    dataset = {key: value for key, value in config["dataset"].items() if key not in NOT_IDENTITY_DATASET}
    return kept | {"dataset": dataset, "hardware": {"precision": config["hardware"]["precision"]}}


def config_hash(config: Config) -> str:
    """Return 8 hexadecimal digits that stand for the identity of a config."""
    return short_hash(identity(config))


def short_hash(value: Any) -> str:
    """Return 8 hexadecimal digits that stand for plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def run_path(config: Config) -> Path:
    """Return the absolute path of the run folder: output_root / experiment_name / name.

    The default name consists of the chosen options, the seed and the hash of the config.

    Raises:
        UserError: `name` or `experiment_name` is not the name of a folder inside of the one that holds it.
    """
    check_name("experiment_name", config["experiment_name"])
    if config["name"]:
        check_name("name", config["name"])
    words = [config["choices"][group] for group in NAME_GROUPS if group in config["choices"]]
    if config["task"]["_target_"] == BENCHMARK:
        name = "benchmark-" + (config["name"] or "-".join([*words, config_hash(config)]))
    else:
        name = config["name"] or "-".join([*words, f"s{config['seed']}", config_hash(config)])
    return Path(config["output_root"]).expanduser().absolute() / config["experiment_name"] / name


def check_name(key: str, name: str) -> None:
    """Refuse a name that leads out of the folder that holds it, is empty, or is too long for a file system."""
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{key}={name} is not the name of a folder inside of output_root; set output_root for another place.")
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        raise UserError(f"{key}={name[:20]}... is longer than {LONGEST_NAME} bytes; choose a shorter one.")


def flatten(config: Any, prefix: str = "") -> Config:
    """Flatten nested dictionaries to dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old -> new` for every flattened key whose values differ."""
    a, b = flatten(old), flatten(new)
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
