"""The config before any work: is it complete and well-typed, and which run does it name? Imports no torch.

The schema of a config node is the signature of its `_target_`, read from the source: unknown options and wrong types are
found in under a second, and a new class needs no second declaration.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from hjepa.errors import UserError
from hjepa.signatures import Signature, signature_of

Config = dict[str, Any]

TOP_LEVEL: Signature = {
    "seed": "int",
    "name": "str | None",
    "init_from": "str | None",
    "experiment_name": "str",
    "output_root": "str",
    "run": "str | None",
    "overwrite": "bool",
}
GROUPS = (
    *("model", "levels", "masking", "loss", "regularizer", "projector", "teacher", "optimizer", "schedule", "dataset"),
    *("hardware", "probe", "tracking", "task", "train", "checkpoint"),
)
# What may differ between two starts of one run: it changes where and how a run computes, not what.
NOT_IDENTITY = ("name", "experiment_name", "output_root", "run", "overwrite", "tracking", "checkpoint", "task", "hardware")
BENCHMARK = "hjepa.measure.benchmark.benchmark"
NOT_IDENTITY_DATASET = ("memory_limit_gb", "workers")
KNOWN_TYPES = {"Literal": Literal, "Sequence": Sequence, "Callable": Callable, "Any": Any, "None": None}
TARGET = re.compile(r"\b_target_:\s*([\w.]+)")
PLAIN_TYPES = {t.__name__: t for t in (bool, int, float, str, list, dict, tuple)}


def resolve(cfg: DictConfig) -> Config:
    """The config as plain data, interpolations resolved; refuses missing mandatory values."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} has no value and needs one; give it as {missing[0]}=... on the command line.")
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def check(config: Config) -> None:
    """Refuse unknown options and wrong types anywhere in a resolved config."""
    for key in config:
        if key not in TOP_LEVEL and key not in GROUPS:
            raise UserError(f"{key} is no option; at the top level there are {', '.join((*TOP_LEVEL, *GROUPS))}.")
    for option, annotation in TOP_LEVEL.items():
        check_type(option, config[option], annotation)
    refuse_foreign(config)
    for path, node in nodes(config):
        check_node(path, node)


def check_node(path: str, node: Config) -> None:
    """Refuse options that the signature of a node's `_target_` does not have, and wrong types."""
    signature = signature_of(node["_target_"])
    options = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    for option, value in options.items():
        if option not in signature:
            raise UserError(f"{path}.{option} is no option of {node['_target_']}; it has {', '.join(signature)}.")
        check_type(f"{path}.{option}", value, signature[option])


def nodes(config: Any, path: str = "") -> Iterator[tuple[str, Config]]:
    """All nodes to instantiate, with their dotted paths."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for position, value in enumerate(config):
            yield from nodes(value, f"{path}[{position}]")


@cache
def targets() -> frozenset[str]:
    """What a config may instantiate: exactly what the files of conf/ name. A config can come from anywhere (a run folder of
    somebody else's, say), and a list of allowed packages would let it call everything in them.
    """
    folder = Path(__file__).resolve().parents[1] / "conf"
    files = (file for file in folder.rglob("*.yaml") if folder / "hydra" not in file.parents)  # Hydra's own are not in a run's
    return frozenset(target for file in files for target in TARGET.findall(file.read_text()))


def refuse_foreign(config: Any) -> None:
    """Refuse targets that no file of conf/ names, and ways to reach around the check of the options."""
    for path, node in nodes(config):
        if str(node["_target_"]) not in targets():
            raise UserError(
                f"{f'{path}.' if path else ''}_target_={node['_target_']!r} is nothing that a config may call; choose an option "
                "of conf/, or add a file there that names it."
            )
        if "_args_" in node or "_recursive_" in node or "_convert_" in node:
            raise UserError(f"{path}: _args_, _convert_ and _recursive_ are no options; give the options by their names.")


def check_type(path: str, value: Any, annotation: str | None) -> None:
    """Refuse a value that its annotation does not admit; annotations of our own classes are left to the constructor."""
    if annotation is None or (isinstance(value, dict) and "_target_" in value):
        return
    try:
        expected = eval(annotation, {"__builtins__": {}}, KNOWN_TYPES | PLAIN_TYPES)
    except NameError:
        return
    try:
        TypeAdapter(expected, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{path}={value!r}: expected {annotation} ({error.errors()[0]['msg'].lower()}).") from None


def identity(config: Config) -> Config:
    """The part of a config that changes the result of a run; that of a benchmark depends on where and how it computes."""
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    dataset = {key: value for key, value in config["dataset"].items() if key not in NOT_IDENTITY_DATASET}
    if config["task"]["_target_"] == BENCHMARK:
        return kept | {"dataset": config["dataset"], "hardware": config["hardware"], "task": config["task"]}
    return kept | {"dataset": dataset, "hardware": {"precision": config["hardware"]["precision"]}}


def fingerprint(config: Config) -> str:
    """8 hexadecimal digits of the identity."""
    return digits(identity(config))


def digits(value: Any) -> str:
    """8 hexadecimal digits of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def run_path(config: Config, choices: dict[str, str]) -> Path:
    """The absolute folder of the run: output_root / experiment_name / name, the name made from the choices by default."""
    parts = [choices[group] for group in ("dataset", "model", "levels", "masking", "loss")]
    if config["task"]["_target_"] == BENCHMARK:
        name = "benchmark-" + (config["name"] or "-".join([*parts, fingerprint(config)]))
    else:
        name = config["name"] or "-".join([*parts, f"s{config['seed']}", fingerprint(config)])
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


def build(node: Config, **more: Any) -> Any:
    """`hydra.utils.instantiate`, with `more` arguments passed as they are and our own sentences let through; refuses what
    `refuse_foreign` does, as a config need not have been checked.
    """
    refuse_foreign(node)
    try:
        if more:  # instantiate would take dataclass arguments for configs
            return instantiate(node, _partial_=True, _convert_="all")(**more)
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def build_or_none(node: Config, **more: Any) -> Any:
    """The same, or None where the option is `none`: a node without target, whatever else a recipe has put there."""
    return build(node, **more) if "_target_" in node else None
