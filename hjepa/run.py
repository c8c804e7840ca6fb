"""From a config to a result: instantiate the parts, start or resume the run, call the task, return the sweeper's metric."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hjepa.config import Config, build, check, resolve, run_path
from hjepa.faults import told
from hjepa.folder import UNSENT, RunFolder
from hjepa.origin import note_command
from hjepa.processes.ranks import launch


def run(cfg: DictConfig) -> float | None:
    """Run the config's task; everything that can be wrong with the config is said before torch is imported."""
    config, path = prepare(cfg)
    return perform(config, path)


def perform(config: Config, path: Path) -> float | None:
    """Run the task of a checked config; faults of the machine are told in one sentence."""
    note_command()
    with told():
        result: float | None = build(config["task"])(config, path)
    return result


def prepare(cfg: DictConfig) -> tuple[Config, Path]:
    """The config as plain data, checked, and the folder of the run that it names."""
    config = resolve(cfg)
    check(config)
    return config, run_path(config, HydraConfig.get().runtime.choices)


def train(config: Config, path: Path) -> float | None:
    """Train; the same config again resumes an unfinished run and shows a finished one's result.

    Returns:
        The linear probe's accuracy (None without probes).
    """
    folder = RunFolder(path, config)
    if done := folder.result():
        from hjepa.summary import tell

        print("This run is finished. To run it anew: overwrite=true, another name or another seed.")
        if config["tracking"] and (path / UNSENT).exists():  # it was killed, or a server was away, at the very end
            from hjepa.tracking.sync import send

            send(config, path)
        tell(done, folder.path, None)
        return done["probe"].get("linear")
    return launch(train_here, config, path)


def train_here(config: Config, path: Path) -> float | None:
    """Train in this process, alone or as one of several."""
    from hjepa.processes.distributed import leave
    from hjepa.session import Session

    try:
        return Session(config, RunFolder(path, config)).run()
    finally:
        leave()
