"""The launcher `hydra/launcher=slurm`, which the options hardware=slurm_* select."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SlurmLauncher(Launcher):
    """Calls `hjepa.sweeps.slurm.launch` with the options of `hjepa.sweeps.slurm.SlurmOptions`."""

    def __init__(self, **options: Any) -> None:
        self.options = OmegaConf.to_container(OmegaConf.create(options), resolve=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hjepa.sweeps.slurm import launch

        return launch(self.options, self.context.config_loader, self.config, job_overrides, initial_job_idx)
