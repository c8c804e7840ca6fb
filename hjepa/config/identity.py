"""The identity of a run: the part of its config that changes the result, and its hash."""

import hashlib
import json
from typing import Any

from hjepa.config.schema import Config

# These options may differ between two starts of one run: they change where and how it computes, not its result.
NOT_IDENTITY = (
    *("choices", "name", "experiment_name", "output_root", "run", "overwrite", "extend"),
    *("tracking", "checkpoint", "task", "hardware"),
)
NOT_IDENTITY_DATASET = ("memory_limit_gb", "workers")
NOT_IDENTITY_TRAIN = ("histograms",)

TRAINING, BENCHMARK = "hjepa.tasks.train_model", "hjepa.tasks.run_benchmark"  # the tasks with a run folder of their own


def identity(config: Config) -> Config:
    """Return the part of a config that changes the result of a run.

    The result of a benchmark is its speed, which also depends on the hardware, the data loading and the options of the task.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    if "train" in kept:
        kept["train"] = {key: value for key, value in kept["train"].items() if key not in NOT_IDENTITY_TRAIN}
    if is_benchmark(config):
        return kept | {key: config[key] for key in ("hardware", "task")}
    dataset = {key: value for key, value in config["dataset"].items() if key not in NOT_IDENTITY_DATASET}
    return kept | {"dataset": dataset, "hardware": {"precision": config["hardware"]["precision"]}}


def starts_from_weights(config: Config) -> bool:
    """Return whether a run, given by its config or its identity, starts from the weights of another one or of a file.

    A frozen teacher does not count: the encoder that is measured is then the student, whose weights are random.
    """
    return bool(config.get("init_from") or config.get("model", {}).get("pretrained"))


def is_benchmark(config: Config) -> bool:
    """Return whether a config, of any version, is that of a benchmark."""
    task = config.get("task")
    return isinstance(task, dict) and task.get("_target_") == BENCHMARK


def config_hash(config: Config) -> str:
    """Return 8 hexadecimal digits that stand for the identity of a config."""
    return short_hash(identity(config))


def short_hash(value: Any) -> str:
    """Return 8 hexadecimal digits that stand for plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def flatten(config: Any, prefix: str = "") -> Config:
    """Flatten nested dictionaries to dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def differences(old: Config, new: Config) -> list[str]:
    """Return `key: old -> new` for every flattened key whose values differ."""
    a, b = flatten(old), flatten(new)
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
