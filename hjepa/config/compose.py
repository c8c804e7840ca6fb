"""Compose a config from conf/ and overrides, outside Hydra's own command line."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from hjepa.config.cli_errors import format_hydra_error
from hjepa.config.errors import UserError
from hjepa.config.paths import CONF, FILES, path_variables
from hjepa.config.quoting import quote


def compose_config(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> DictConfig:
    """Compose a config, without checking it.

    Args:
        overrides: Options and values as on the command line.
        config_dir: Folder with further options, as for `--config-dir`.

    Returns:
        The config with Hydra's own part, `hydra`.

    Raises:
        UserError: If an option does not exist or cannot be parsed.
    """
    folders = [FILES, *([Path(config_dir).expanduser().absolute()] if config_dir is not None else [])]
    if not folders[-1].is_dir():
        raise UserError(f"The config folder {folders[-1]} does not exist; expected a folder with GROUP/OPTION.yaml files.")
    searchpath = ",".join(quote(f"file://{folder}") for folder in folders)
    try:
        with environment(path_variables()), initialize_config_dir(str(CONF), job_name="hjepa", version_base="1.3"):
            return compose("config", [*overrides, f"hydra.searchpath=[{searchpath}]"], return_hydra_config=True)
    except (CompactHydraException, ValueError) as error:
        raise UserError(format_hydra_error(error, overrides)) from None


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def list_options(config_dir: str | os.PathLike[str] | None) -> dict[str, list[str]]:
    """Return the options of every config group; files that other files include, such as `_common.yaml`, are none."""
    options: dict[str, set[str]] = {}
    for folder in (CONF, *([Path(config_dir).expanduser()] if config_dir is not None else [])):
        for file in folder.glob("*/*.yaml"):
            if file.parent.name != "hydra" and not file.name.startswith("_"):
                options.setdefault(file.parent.name, set()).add(file.stem)
    groups = {group: sorted(names) for group, names in sorted(options.items())}
    return groups | {"+sweeps": sorted(file.stem for file in (FILES / "sweeps").glob("*.yaml"))}
