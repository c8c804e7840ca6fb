"""The launcher `hydra/launcher=slots`, the default, which runs the jobs of a sweep on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SlotsConf:
    """Config node of the launcher, which has no options."""

    _target_: str = "hydra_plugins.hjepa_launchers.slots.SlotsLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="slots", node=SlotsConf, provider="hjepa")


class SlotsLauncher(Launcher):
    """Calls `hjepa.sweeps.local.launch`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hjepa.sweeps.local import launch

        return launch(self.context.config_loader, self.config, job_overrides, initial_job_idx)
