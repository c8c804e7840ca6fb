"""The config before any work: is it complete and well-typed, and which run does it name? Imports no torch.

The schema of a config node is the signature of its `_target_`, read from the source: unknown options and wrong types are
found in under a second, and a new class needs no second declaration.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from hjepa.config.schema import Config

# What may differ between two starts of one run: it changes where and how a run computes, not what.
NOT_IDENTITY = ("name", "experiment_name", "output_root", "run", "overwrite", "tracking", "checkpoint", "task", "hardware")

BENCHMARK = "hjepa.tasks.run_benchmark"

NOT_IDENTITY_DATASET = ("memory_limit_gb", "workers")


def identity(config: Config) -> Config:
    """The part of a config that changes the result of a run; that of a benchmark depends on where and how it computes."""
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    dataset = {key: value for key, value in config["dataset"].items() if key not in NOT_IDENTITY_DATASET}
    if config["task"]["_target_"] == BENCHMARK:
        return kept | {"dataset": config["dataset"], "hardware": config["hardware"], "task": config["task"]}
    return kept | {"dataset": dataset, "hardware": {"precision": config["hardware"]["precision"]}}


def config_hash(config: Config) -> str:
    """8 hexadecimal digits of the identity."""
    return short_hash(identity(config))


def short_hash(value: Any) -> str:
    """8 hexadecimal digits of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def run_path(config: Config, choices: dict[str, str]) -> Path:
    """The absolute folder of the run: output_root / experiment_name / name, the name made from the choices by default."""
    parts = [choices[group] for group in ("dataset", "model", "levels", "masking", "loss")]
    if config["task"]["_target_"] == BENCHMARK:
        name = "benchmark-" + (config["name"] or "-".join([*parts, config_hash(config)]))
    else:
        name = config["name"] or "-".join([*parts, f"s{config['seed']}", config_hash(config)])
    return Path(config["output_root"]).expanduser().absolute() / config["experiment_name"] / name


def flatten(config: Any, prefix: str = "") -> Config:
    """Dotted keys and plain values: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()}


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` of every flattened key that differs."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
