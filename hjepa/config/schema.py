"""The schema of a config: which options there are, and which values they take. Imports no torch.

The schema of a config node is the signature of its `_target_`, read from the source. Unknown options and wrong values are
reported in under a second, before any work starts, and a new class needs no second declaration of its options.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Optional, Union, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from hjepa.config import types
from hjepa.config.errors import UserError
from hjepa.config.quoting import as_text, render
from hjepa.config.signatures import ANY_OPTION, Signature, signature_of
from hjepa.config.targets import iter_targets, validate_targets

Config = dict[str, Any]

TOP_LEVEL: Signature = {
    "choices": "dict[str, str]",
    "seed": "int",
    "name": "str | None",
    "init_from": "str | None",
    "experiment_name": "str",
    "output_root": "str",
    "run": "str | None",
    "overwrite": "bool",
    "extend": "bool",
}

GROUPS = (
    *("model", "levels", "masking", "loss", "regularizer", "projector", "teacher", "optimizer", "schedule", "dataset"),
    *("hardware", "probe", "tracking", "task", "protocol", "train", "checkpoint"),
)

BOUNDED_TYPES = {name: value for name, value in vars(types).items() if get_origin(value) is Annotated}
PLAIN_TYPES = {t.__name__: t for t in (bool, int, float, str, list, dict, tuple)}
TYPING = {"Literal": Literal, "Optional": Optional, "Union": Union, "Sequence": Sequence, "Callable": Callable, "Any": Any}
KNOWN_TYPES = {"__builtins__": {}, **PLAIN_TYPES, **TYPING, **BOUNDED_TYPES}


def resolve(cfg: DictConfig) -> Config:
    """Return a composed config as plain data, with all interpolations resolved.

    `choices` keeps the option of every group, without Hydra's own groups and groups without an option.

    Raises:
        UserError: A mandatory value is missing, a value refers to one that does not exist, or a text is empty.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{missing[0]} has no value; set it with {missing[0]}=... on the command line.")
        config: Config = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{error.full_key} refers to a value that does not exist ({reason}); correct or remove it.") from None
    if empty := sorted(empty_texts(config), key=lambda path: path.count(".")):  # first those to which others refer
        raise UserError(f"{empty[0]}='' is empty (a shell variable without a value?); give a value, or null for none.")
    chosen = {group: option for group, option in config.get("choices", {}).items() if option and not group.startswith("hydra/")}
    return config | {"choices": dict(sorted(chosen.items()))}


def empty_texts(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted path of every empty text in plain data."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from empty_texts(child, f"{path}.{key}".lstrip("."))
    elif value == "":
        yield path


def check(config: Config) -> None:
    """Refuse unknown options and wrong values anywhere in a resolved config."""
    for key in config:
        if key not in TOP_LEVEL and key not in GROUPS:
            raise UserError(f"{key} is not an option; the options at the top level are {', '.join((*TOP_LEVEL, *GROUPS))}.")
    for group in GROUPS:
        if not isinstance(config.get(group, {}), dict):
            raise UserError(f"{group}={config[group]!r}: expected an option of the group, or its values as {group}.KEY=VALUE.")
    if missing := [key for key in (*TOP_LEVEL, *GROUPS) if key not in config and key != "protocol"]:
        raise UserError(f"{missing[0]} is missing; expected the complete config of a run, as hjepa.compose returns it.")
    for option, annotation in TOP_LEVEL.items():
        check_type(option, config[option], annotation)
    validate_targets(config)
    # The dataset comes first, since the model takes the size of the images from it.
    for path, node in sorted(iter_targets(config), key=lambda target: not target[0].startswith("dataset")):
        check_node(path, node)


def check_node(path: str, node: Config) -> None:
    """Refuse unknown options and wrong values in a node with a `_target_`.

    Args:
        path: Dotted path of the node in the config, for the error message.
        node: The node.
    """
    signature = signature_of(node["_target_"])
    options = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    for option, value in options.items():
        if option not in signature and ANY_OPTION not in signature:
            raise UserError(
                f"{path}.{option} is not an option of {node['_target_']}; its options are {', '.join(signature) or 'none'}."
            )
        check_type(f"{path}.{option}", value, signature.get(option))


def check_type(path: str, value: Any, annotation: str | None) -> None:
    """Refuse a value that its annotation does not admit.

    Annotations of types that only the source of the class knows are left to the constructor.
    """
    if annotation is None or (isinstance(value, dict) and "_target_" in value):
        return
    try:
        adapter(annotation).validate_python(value)
    except ValidationError as error:
        reason = explain(error)
        expected = reason if reason.startswith("expected ") else f"expected {annotation} ({reason})"
        raise UserError(f"{path}={value!r}: {expected}{hint(path, value, annotation)}.") from None
    except (NameError, AttributeError, TypeError, PydanticUserError):
        if annotation.startswith("Callable") and "None" not in annotation and not callable(value):
            raise UserError(f"{path}={value!r}: expected options with a _target_, as in the YAML file of the group.") from None


def hint(path: str, value: Any, annotation: str) -> str:
    """Return what to write if a number was typed where a text belongs, as the end of a sentence; empty for other mistakes."""
    text = as_text(value)
    try:
        adapter(annotation).validate_python(text)
    except ValidationError:
        return ""
    return f"; write {shlex.quote(f'{path}={render(text)}')}"


def adapter(annotation: str) -> TypeAdapter[Any]:
    """Return what validates the values of an annotation, without converting them."""
    return TypeAdapter(eval(annotation, dict(KNOWN_TYPES)), config=ConfigDict(strict=True))


def explain(error: ValidationError) -> str:
    """Return why a value was refused.

    A union reports an error for each of its types. Those of the types that the value matched best count: a wrong element of a
    list before "not a number", and a number out of bounds before "not a list".
    """
    errors = [details for details in error.errors() if details["type"] != "none_required"]
    ranks = [(len(details["loc"]), not details["type"].endswith(("_type", "_parsing"))) for details in errors]
    reasons = []
    for details, rank in zip(errors, ranks, strict=True):
        if rank == max(ranks):
            items = "".join(f"item {key}: " for key in details["loc"] if isinstance(key, int))
            reasons.append(items + details["msg"].removeprefix("Value error, ").lower())
    return ", or ".join(dict.fromkeys(reasons))
