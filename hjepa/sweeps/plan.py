"""A sweep: its jobs, planned before anything starts, and what is known of them in the sweep folder.

A launcher plans the jobs, runs them wherever it does, calls `write` whenever a job's state changes, and `end` at last. All
results come from the run folders, so the table and the plot can be made anew at any time (`task=sweep`).

    sweep.json   the jobs, their states and results        table.txt, sweep.png, progress.png   for people
    N.log        what job N said
"""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.run import prepare
from hjepa.config.schema import Config
from hjepa.sweeps.job import Job
from hjepa.tracking.run_folder import RunFolder


def plan_jobs(loader: ConfigLoader, master: DictConfig, overrides: Sequence[Sequence[str]], first: int = 0) -> list[Job]:
    """Compose every job: a wrong config is FAILED and a finished run is finished before anything starts.

    Args:
        loader, master: Hydra's, the config of the sweep; overrides: of each job; first: number of the first job.
    """
    if OmegaConf.select(master, "hydra.sweeper.max_batch_size"):
        raise UserError("hydra.sweeper.max_batch_size would end the sweep after a failed job; use hardware.slots instead.")
    jobs: list[Job] = []
    for number, job_overrides in enumerate(overrides, first):
        try:
            composed = loader.load_sweep_config(master, list(job_overrides))
            if composed.hydra.runtime.choices["hydra/launcher"] != master.hydra.runtime.choices["hydra/launcher"]:
                raise UserError(
                    "A sweep is launched as a whole: hardware=slurm_* cannot be chosen for a part of its jobs; give it alone, as "
                    "in `--multirun hardware=slurm_cpu seed=0,1`."
                )
            config, folder = prepare_job(composed)
            twin = next((job for job in jobs if job.folder == folder), None)
            if twin:
                raise UserError(
                    f"This is the run of job {twin.number} again: what differs changes no result, or name={config['name']} is "
                    "the same for both; sweep something that changes the result, and give no name."
                )
            done = RunFolder(folder, config).result() if config["task"]["_target_"] == "hjepa.tasks.train_model" else {}
        except UserError as error:
            jobs.append(Job(number, list(job_overrides), None, state="FAILED", reason=str(error)))
            continue
        state = "finished" if done else "pending"
        jobs.append(Job(number, list(job_overrides), folder, state=state, config=config, composed=composed))
    return jobs


def prepare_job(composed: DictConfig) -> tuple[Config, Path]:
    """The checked config of a job and the folder of its run."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        return prepare(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    finally:
        HydraConfig.instance().cfg = before
