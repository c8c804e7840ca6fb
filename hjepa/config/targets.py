"""Targets: the classes and functions that a config may instantiate.

Instantiating a config calls whatever its `_target_`s name, and a config may come from anywhere, for example from the run
folder of a stranger. A target is therefore allowed only if a YAML file names it that the user trusts: a file of hjepa's own
conf/, or of a folder that the command line named with `--config-dir` or `hydra.searchpath`. Nothing has to be registered:
a class of your own and a YAML file in a folder of your own are enough.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hydra.conf import RuntimeConf

from hjepa.config.errors import UserError
from hjepa.config.paths import CONF, FILES
from hjepa.config.signatures import find_module

USER_TARGETS = "HJEPA_TARGETS"  # environment variable, so that the processes that a command starts allow the same targets

TARGET = re.compile(r"""\b_target_["']?\s*:\s*["']?([\w.]+)""")


def allowed_targets() -> frozenset[str]:
    """Return the dotted paths of everything that a config may instantiate."""
    return hjepa_targets() | frozenset(os.environ.get(USER_TARGETS, "").split())


@cache
def hjepa_targets() -> frozenset[str]:
    """Return the targets that hjepa's own conf/ names."""
    return targets_in(CONF, group_folders())


@cache
def group_folders() -> frozenset[str]:
    """Return the names of hjepa's config groups; conf/hydra configures Hydra itself, not a run."""
    return frozenset(folder.name for folder in CONF.iterdir() if folder.is_dir()) - {"hydra"}


def targets_in(folder: Path, groups: frozenset[str]) -> frozenset[str]:
    """Return the targets that the YAML files at the top of a config folder and in its group folders name.

    Other folders are not read: a config folder may lie beside outputs/, which may hold configs from elsewhere.
    """
    files = [*folder.glob("*.yaml"), *(file for group in groups for file in (folder / group).rglob("*.yaml"))]
    return frozenset(target for file in files for target in TARGET.findall(file.read_text()))


def allow_targets_of_command_line(runtime: RuntimeConf) -> None:
    """Allow the targets of the config folders that the command line named, in this process and in those that it starts.

    Args:
        runtime: `hydra.runtime` of the composed config: the folders that Hydra searched, and the option of every group.
    """
    groups = group_folders() | {group.partition("@")[0].split("/")[0] for group in runtime.choices} - {"hydra"}
    targets: set[str] = set()
    for source in runtime.config_sources:
        if source.provider in ("main", "command-line", "hydra.searchpath in command-line"):
            for folder in source_folders(source.schema, source.path):
                if folder not in (CONF, FILES):  # the latter holds sweeps/ and, in a checkout, outputs/
                    targets |= targets_in(folder, groups)
    os.environ[USER_TARGETS] = " ".join(sorted(targets))


def source_folders(schema: str, path: str) -> list[Path]:
    """Return the folders of one of Hydra's config sources, `file://...` or `pkg://...`."""
    if schema == "file":
        return [Path(path).expanduser().resolve()]
    spec = find_module(path)
    return [Path(folder).resolve() for folder in (spec and spec.submodule_search_locations) or ()]


def iter_targets(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dotted path and the node of everything in a config that would be instantiated."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from iter_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for position, value in enumerate(config):
            yield from iter_targets(value, f"{path}[{position}]")


def validate_targets(config: Any) -> None:
    """Refuse targets that are not allowed, and keys that would bypass the check of the options.

    Raises:
        UserError: A target is named by no trusted YAML file, or a node has `_args_`, `_convert_` or `_recursive_`.
    """
    for path, node in iter_targets(config):
        if str(node["_target_"]) not in allowed_targets():
            raise UserError(
                f"{f'{path}.' if path else ''}_target_={node['_target_']!r} is not allowed, because no YAML file in conf/ names "
                "it; choose an option of conf/, or add --config-dir=FOLDER, where FOLDER/GROUP/OPTION.yaml names the target."
            )
        if "_args_" in node or "_recursive_" in node or "_convert_" in node:
            raise UserError(f"{path}: _args_, _convert_ and _recursive_ are not allowed; set every option by its name.")
