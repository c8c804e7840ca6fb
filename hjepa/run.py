"""From a config to a result: instantiate the parts, start or resume the run, call the task, return the sweeper's metric."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hjepa.config import Config, build, check, resolve, run_path
from hjepa.faults import told
from hjepa.folder import RunFolder


def run(cfg: DictConfig) -> float | None:
    """Run the config's task; everything that can be wrong with the config is said before torch is imported."""
    config = resolve(cfg)
    check(config)
    path = run_path(config, HydraConfig.get().runtime.choices)
    with told():
        result: float | None = build(config["task"])(config, path)
    return result


def train(config: Config, path: Path) -> float | None:
    """Train; the same config again resumes an unfinished run and shows a finished one's result.

    Returns:
        The linear probe's accuracy (None without probes).
    """
    folder = RunFolder(path, config)
    if not config["overwrite"]:
        folder.refuse_other_config()
        done = folder.summary()
        if done.get("status") == "finished":
            from hjepa.summary import tell

            print("This run is finished. To run it anew: overwrite=true, another name or another seed.")
            tell(done, folder.path, None)
            return done["probe"].get("linear")
    from hjepa.session import Session

    return Session(config, folder).run()
