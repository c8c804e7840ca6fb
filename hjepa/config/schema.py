"""The config before any work: is it complete and well-typed, and which run does it name? Imports no torch.

The schema of a config node is the signature of its `_target_`, read from the source: unknown options and wrong types are
found in under a second, and a new class needs no second declaration.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from hjepa.config.errors import UserError
from hjepa.config import types
from hjepa.config.signatures import Signature, signature_of

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

KNOWN_TYPES = {"Literal": Literal, "Sequence": Sequence, "Callable": Callable, "Any": Any, "None": None}

TARGET = re.compile(r"\b_target_:\s*([\w.]+)")

PLAIN_TYPES = {t.__name__: t for t in (bool, int, float, str, list, dict, tuple)}
BOUNDED_TYPES = {name: value for name, value in vars(types).items() if name.endswith(("Int", "Float", "Fraction", "Range"))}


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
    validate_targets(config)
    for path, node in iter_targets(config):
        check_node(path, node)


def check_node(path: str, node: Config) -> None:
    """Refuse options that the signature of a node's `_target_` does not have, and wrong types."""
    signature = signature_of(node["_target_"])
    options = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    for option, value in options.items():
        if option not in signature:
            raise UserError(f"{path}.{option} is no option of {node['_target_']}; it has {', '.join(signature)}.")
        check_type(f"{path}.{option}", value, signature[option])


def iter_targets(config: Any, path: str = "") -> Iterator[tuple[str, Config]]:
    """All nodes to instantiate, with their dotted paths."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from iter_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for position, value in enumerate(config):
            yield from iter_targets(value, f"{path}[{position}]")


@cache
def allowed_targets() -> frozenset[str]:
    """What a config may instantiate: exactly what the files of conf/ name. A config can come from anywhere (a run folder of
    somebody else's, say), and a list of allowed packages would let it call everything in them.
    """
    folder = Path(__file__).resolve().parents[2] / "conf"
    files = (file for file in folder.rglob("*.yaml") if folder / "hydra" not in file.parents)  # Hydra's own are not in a run's
    return frozenset(target for file in files for target in TARGET.findall(file.read_text()))


def validate_targets(config: Any) -> None:
    """Refuse targets that no file of conf/ names, and ways to reach around the check of the options."""
    for path, node in iter_targets(config):
        if str(node["_target_"]) not in allowed_targets():
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
        expected = eval(annotation, {"__builtins__": {}}, KNOWN_TYPES | PLAIN_TYPES | BOUNDED_TYPES)
    except NameError:
        return
    try:
        TypeAdapter(expected, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{path}={value!r}: expected {annotation} ({error.errors()[0]['msg'].lower()}).") from None
