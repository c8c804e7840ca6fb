"""Planning of a sweep: every job's config is composed and checked before any job starts."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.identity import BENCHMARK, TRAINING
from hjepa.config.run import prepare
from hjepa.config.schema import Config
from hjepa.sweeps.job import Job
from hjepa.sweeps.sweep import runs_a_search
from hjepa.tracking.run_folder import RunFolder


def plan_jobs(loader: ConfigLoader, sweep_config: DictConfig, overrides: Sequence[Sequence[str]], first: int = 0) -> list[Job]:
    """Compose the jobs of a sweep; invalid configs are FAILED and finished runs are finished from the start.

    Args:
        loader: Hydra's config loader.
        sweep_config: The config of the whole sweep.
        overrides: Overrides of each job.
        first: Number of the first job.
    """
    if OmegaConf.select(sweep_config, "hydra.sweeper.max_batch_size"):
        raise UserError("hydra.sweeper.max_batch_size would end the sweep after a failed job; use hardware.slots instead.")
    launcher = sweep_config.hydra.runtime.choices["hydra/launcher"]
    jobs: list[Job] = []
    for number, job_overrides in enumerate(overrides, first):
        try:
            composed = loader.load_sweep_config(sweep_config, list(job_overrides))
            if composed.hydra.runtime.choices["hydra/launcher"] != launcher:
                raise UserError(
                    "A sweep is launched as a whole: hardware=slurm_* cannot be chosen for a part of its jobs; choose it for "
                    "all of them, as in `--multirun hardware=slurm_cpu seed=0,1`."
                )
            config, path = prepare_job(composed)
            task = config["task"]["_target_"]
            folder = path if task in (TRAINING, BENCHMARK) else None
            twin = next((job for job in jobs if folder and job.folder == folder), None)
            if twin and runs_a_search(sweep_config):
                jobs.append(Job(number, list(job_overrides), folder, state="finished", config=config))  # as soon as the twin is
                continue
            if twin:
                raise UserError(
                    f"This is the run of job {twin.number} again: the jobs differ only in options that change no result, or "
                    f"name={config['name']} is the same for both; sweep an option that changes the result, and leave out name."
                )
            is_finished = task == TRAINING and bool(RunFolder(path, config).finished_summary())
        except UserError as error:
            jobs.append(Job(number, list(job_overrides), None, state="FAILED", reason=str(error)))
            continue
        state = "finished" if is_finished else "pending"
        jobs.append(Job(number, list(job_overrides), folder, state=state, config=config, composed=composed))
    return jobs


def prepare_job(composed: DictConfig) -> tuple[Config, Path]:
    """Return the checked config of a job and its run folder."""
    current = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        return prepare(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    finally:
        HydraConfig.instance().cfg = current
