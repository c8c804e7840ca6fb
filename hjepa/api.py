"""The Python API: compose a config, train it, and load what was trained.

    import hjepa

    config = hjepa.compose("experiment=smoke", "seed=1")
    config.train.epochs = 1
    run = hjepa.train(config)
    features = run.features("path/to/images")

Every mistake in an argument raises a `hjepa.UserError`, whose message is the sentence that the command line would print.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from hjepa.config.compose import compose_config, environment
from hjepa.config.errors import UserError
from hjepa.config.paths import path_variables
from hjepa.config.quoting import other_forms, parse
from hjepa.config.run import import_from_working_directory, perform
from hjepa.config.run_path import run_path
from hjepa.config.schema import Config, check, resolve
from hjepa.config.targets import USER_TARGETS, allow_targets_of_command_line

if TYPE_CHECKING:
    from hjepa.tasks.inference import Run as Run

EXTERNAL = ("${oc.env:", "${hydra:", "${now:")  # interpolations that only have a value while a config is composed


def __getattr__(name: str) -> Any:
    """Import `Run`, and with it torch, when it is first used."""
    if name == "Run":
        from hjepa.tasks.inference import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def compose(*overrides: str, config_dir: str | os.PathLike[str] | None = None) -> DictConfig:
    """Compose and check the config of a command line.

    The config can be edited: `config.train.epochs = 1`. Options that refer to other options follow them, as on the command line:
    after `config.dataset.image_size = 64`, `config.model.image_size` is 64.

    Args:
        *overrides: Options and values as on the command line, such as `"model=vit_tiny"` and `"seed=1"`.
        config_dir: Folder with further options, as for `--config-dir`. Classes that it names may be instantiated.

    Returns:
        The config, in which unknown keys cannot be set.

    Raises:
        UserError: If an option is unknown, has several values, or a value is missing or of the wrong type.

    Example:
        >>> config = hjepa.compose("experiment=cifar10", "dataset.root=images", "seed=1")
        >>> config.optimizer.lr = 1e-3
    """
    check_overrides(overrides)
    import_from_working_directory()
    config = compose_config(overrides, config_dir)
    with hydra_config(config), environment(path_variables()):  # to which interpolations refer
        return finish(config)


def check_overrides(overrides: Sequence[Any]) -> None:
    """Refuse options that are no texts, such as a list of them, and options with several values."""
    for override in overrides:
        if not isinstance(override, str):
            raise UserError(
                f"hjepa.compose({override!r}): expected every option as a text of its own, as in "
                'hjepa.compose("model=vit_tiny", "seed=1"); write hjepa.compose(*options) for a list of options.'
            )
        if (parsed := parse(override)) and parsed.is_sweep_override():
            raise UserError(f"{override} has several values; call hjepa.compose once for each of them{other_forms(override)}.")


@contextmanager
def hydra_config(config: DictConfig | None) -> Iterator[None]:
    """Set the config that Hydra considers the current one while the context lasts."""
    current = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = config and OmegaConf.masked_copy(config, "hydra")  # type: ignore[assignment]
    try:
        yield
    finally:
        HydraConfig.instance().cfg = current


def finish(config: DictConfig) -> DictConfig:
    """Check a composed config, and return it without Hydra's part and without references to the environment."""
    if config.hydra.mode is not None and config.hydra.mode.name == "MULTIRUN":
        raise UserError("A sweep has several configs; compose them one by one, or start the sweep on the command line.")
    known = os.environ.get(USER_TARGETS, "").split()
    allow_targets_of_command_line(config.hydra.runtime)
    os.environ[USER_TARGETS] = " ".join(sorted({*known, *os.environ[USER_TARGETS].split()}))  # those of earlier configs stay
    with open_dict(config):
        del config["hydra"]
    resolved = resolve(config)
    check(resolved)
    editable = OmegaConf.create(replace_external(OmegaConf.to_container(config), resolved))
    OmegaConf.set_struct(editable, True)
    return editable


def replace_external(raw: Any, resolved: Any) -> Any:
    """Return raw config values, where references to the environment and to Hydra are replaced by their resolved values."""
    if isinstance(raw, dict):
        return {key: replace_external(value, resolved[key]) for key, value in raw.items()}
    if isinstance(raw, list):
        return [replace_external(*pair) for pair in zip(raw, resolved, strict=True)]
    return resolved if isinstance(raw, str) and any(start in raw for start in EXTERNAL) else raw


def train(config: DictConfig | Mapping[str, Any]) -> "Run":
    """Train a config in this process, and load the result.

    As on the command line, an unfinished run of the same config is continued, and a finished one is returned at once. Ctrl-C (in
    a notebook, "interrupt") saves the run before `KeyboardInterrupt` is raised; the same call continues it.

    Args:
        config: Config from `compose`, edited or not, or the config of an earlier run.

    Returns:
        The trained run, as from `load`.

    Raises:
        UserError: If the config is wrong, or training cannot continue.

    Example:
        >>> run = hjepa.train(hjepa.compose("experiment=smoke"))
        >>> run.summary["probe"]["linear"]
    """
    plain = resolve(config if isinstance(config, DictConfig) else OmegaConf.create(dict(config)))
    check(plain)
    if plain["task"]["_target_"] != "hjepa.tasks.train_model":
        raise UserError(f"task={plain['choices']['task']}: hjepa.train needs task=train; use the command line for other tasks.")
    folder = run_path(plain)
    with hydra_config(None), messages():
        try:
            perform(plain, folder)
        except SystemExit:  # the command line would end here
            raise KeyboardInterrupt("The same call continues the run from its last checkpoint, if it has one.") from None
    from hjepa.tasks.inference import load_run_folder

    return load_run_folder(folder, None, plain)


@contextmanager
def messages() -> Iterator[None]:
    """Show the messages of hjepa while the context lasts, if the program has not configured logging itself."""
    logger = logging.getLogger("hjepa")
    level, handler = logger.level, logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    own = not logger.hasHandlers()
    logger.setLevel(level or logging.INFO)
    if own:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def load(
    folder: str | os.PathLike[str],
    checkpoint: str | None = None,
    device: str | None = None,
    config_dir: str | os.PathLike[str] | None = None,
) -> "Run":
    """Load a trained encoder from a run folder, or from the folder that `task=export` wrote.

    Args:
        folder: Run folder (`outputs/EXPERIMENT/NAME`) or export folder (`outputs/EXPERIMENT/NAME/export`).
        checkpoint: Name of a checkpoint of the run, such as `"latest"` or `"epoch-00005"`. None: the best one by linear probe.
        device: `"cpu"`, `"cuda"` or `"mps"`. None: the first of cuda, mps and cpu that this machine has.
        config_dir: Folder with further options, if the run was trained with one.

    Returns:
        The encoder with its config, metrics and preprocessing.

    Raises:
        UserError: If the folder, the checkpoint or the device does not exist.

    Example:
        >>> run = hjepa.load("outputs/default/NAME")
        >>> run.features("path/to/images")
    """
    path = Path(folder).expanduser().absolute()
    hardware = f"hardware.device={device or 'auto'}"
    if (path / "config.yaml").exists():
        from hjepa.tasks.inference import load_run_folder

        command: Config = resolve(compose(hardware, "tracking=none", config_dir=config_dir))
        return load_run_folder(path, checkpoint, command)
    if any((path / name).exists() for name in ("config.json", "timm.json")) and (path / "preprocess.json").exists():
        from hjepa.config.instantiate import build
        from hjepa.tasks.inference import load_export_folder

        if checkpoint is not None:
            raise UserError(f"{path} is an export, which has no checkpoints; leave checkpoint={checkpoint!r} out.")
        return load_export_folder(path, build(resolve(compose(hardware))["hardware"]).device)
    reason = "is neither a run folder nor an export with a model of timm" if path.is_dir() else "does not exist"
    raise UserError(f"{path} {reason}; expected a run folder (outputs/EXPERIMENT/NAME) or its export folder.")
