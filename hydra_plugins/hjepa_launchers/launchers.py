"""The launchers `hydra/launcher=submitit_local`, the default, and `submitit_slurm`, which the options hardware=slurm_* choose.

Both extend the launchers of hydra-submitit-launcher and have its options. The YAML files of the same names in
conf/hydra/launcher extend the schemas below. What they share is in `hjepa.sweeps.launcher`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra_plugins.hydra_submitit_launcher import submitit_launcher as plugin
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

if TYPE_CHECKING:
    from hjepa.sweeps.submission import Submission


@dataclass
class LocalConf(LocalQueueConf):
    """Schema of `hydra/launcher=submitit_local`."""

    _target_: str = f"{__name__}.LocalLauncher"
    wait: bool = True
    poll_seconds: float = 0.2


@dataclass
class SlurmConf(SlurmQueueConf):
    """Schema of `hydra/launcher=submitit_slurm`."""

    _target_: str = f"{__name__}.SlurmLauncher"
    wait: bool = True
    poll_seconds: float = 10
    mem_gb: float | None = None  # the plugin admits whole numbers only
    srun_args: list[str] = field(default_factory=list)  # which the plugin does not have


for name, schema in {"_local": LocalConf, "_slurm": SlurmConf}.items():
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=schema, provider="hjepa")


class ReplaceOptions(SearchPathPlugin):
    """Lets our options take the places of those that plugins have given the same names, which Hydra takes for their schemas."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from hjepa.config.paths import CONF

        if any(source.path.endswith(str(CONF)) for source in search_path.get_path()):  # other programs keep those options
            options = ConfigStore.instance().repo["hydra"]
            for name in ("submitit_local.yaml", "submitit_slurm.yaml"):
                options["launcher"].pop(name, None)
            if "optuna.yaml" in options["sweeper"]:  # hydra-optuna-sweeper is installed
                options["sweeper"]["_optuna.yaml"] = options["sweeper"].pop("optuna.yaml")


class SweepLauncher(plugin.BaseSubmititLauncher):
    """The base of both launchers; a pickled instance is the function that a job calls."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hjepa.sweeps.launcher import launch

        worker = type(self)()  # which carries nothing of this process
        loader = self.hydra_context.config_loader
        return launch(worker, self._EXECUTOR, self.params, loader, self.config, job_overrides, initial_job_idx)

    def __call__(self, submission: "Submission") -> float | str | None:
        return submission.run()


class LocalLauncher(SweepLauncher, plugin.LocalLauncher):
    """Runs jobs on this machine."""


class SlurmLauncher(SweepLauncher, plugin.SlurmLauncher):
    """Runs jobs on a SLURM cluster."""
