"""What both launchers do: plan the jobs of a sweep, submit and follow them, and print their table."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import DictConfig, OmegaConf

from hjepa.config.errors import UserError, friendly_errors
from hjepa.config.paths import INSTALLED
from hjepa.sweeps.job import Job
from hjepa.sweeps.local import LocalQueue
from hjepa.sweeps.plan import plan_jobs
from hjepa.sweeps.slurm import SlurmQueue
from hjepa.sweeps.submission import STOPPED_STATUS
from hjepa.sweeps.sweep import Sweep, runs_a_search

log = logging.getLogger(__name__)

OURS = ("_target_", "wait", "poll_seconds")  # options that are not submitit's

MAY_BE_ZERO = ("gpus_per_node", "gpus_per_task", "max_num_timeout")

NUM_FAILURES = 5  # trials that have to fail before a search without any result ends

QUEUES = {"local": LocalQueue, "slurm": SlurmQueue}


@friendly_errors()
def launch(
    worker: Any,
    cluster: str,
    options: dict[str, Any],
    loader: ConfigLoader,
    sweep_config: DictConfig,
    overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Run the jobs of a sweep; see `hydra.plugins.launcher.Launcher.launch`.

    Args:
        worker: The function that a job calls with its submission.
        cluster: "local" or "slurm".
        options: Options of the launcher, conf/hydra/launcher/submitit_*.yaml.
        loader: Hydra's config loader.
        sweep_config: The config of the whole sweep.
        overrides: Overrides of each job.
        first: Number of the first job.

    Raises:
        UserError: An option is wrong, jobs could not be submitted, or jobs failed.
        SystemExit: The sweep was stopped.
    """
    sweep = Sweep(Path(sweep_config.hydra.sweep.dir).expanduser().absolute())
    sweep.hide_passwords()  # first, since everything else may be refused
    check_numbers(options)
    is_search = runs_a_search(sweep_config)
    if is_search and not options["wait"]:
        raise UserError("hydra.launcher.wait=false: a search needs the results of its jobs; leave it out.")
    executor = build_executor(cluster, options)
    jobs = plan_jobs(loader, sweep_config, overrides, first)
    import_this_copy()
    earlier = sweep.load() if first else []
    sweep.refresh(earlier)
    queue = QUEUES[cluster](sweep, earlier + jobs, worker, executor, options["poll_seconds"], options=options)
    log_done(jobs)
    if queue.waiting and not options["wait"]:
        queue.submit()
        return []
    stopped = queue.follow()
    sweep.save(queue.jobs)
    sweep.refresh(jobs)
    if is_search and not stopped and may_go_on(queue.jobs, sweep_config.hydra.sweeper):
        return sweep.trial_returns(jobs)  # `SweepStart` makes the table when the search has ended
    sweep.summarize(queue.jobs)
    if stopped:
        print("Stopped. The same command continues the sweep.", file=sys.stderr)
        raise SystemExit(STOPPED_STATUS)
    return sweep.job_returns(jobs)


def may_go_on(jobs: list[Job], sweeper: DictConfig) -> bool:
    """Return whether a search goes on: a trial has a result, or only a few have failed and others follow."""
    num_failures = max(NUM_FAILURES, sweeper.get("n_jobs", 1))
    return any(job.is_complete for job in jobs) or len(jobs) < min(num_failures, sweeper.get("n_trials", num_failures))


def log_done(jobs: list[Job]) -> None:
    """Log which jobs need not or cannot be run."""
    for job in jobs:
        if job.state == "FAILED":
            log.info("job %d FAILED: %s", job.number, job.reason)
        elif job.is_done:
            log.info("job %d was finished before: %s", job.number, job.folder)


def check_numbers(options: dict[str, Any]) -> None:
    """Raise a UserError for a number that is not positive; the schema of the launcher has checked the types."""
    for option, value in options.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (value < 0 or (value == 0 and option not in MAY_BE_ZERO)):
            raise UserError(f"hydra.launcher.{option}={value}: expected a number above 0.")


def build_executor(cluster: str, options: dict[str, Any]) -> submitit.AutoExecutor:
    """Return submitit's executor for the options of the launcher, as hydra-submitit-launcher does inside its `launch`."""
    shared = set(OmegaConf.structured(BaseQueueConf))
    parameters = {key: value for key, value in options.items() if key not in ("submitit_folder", "max_num_timeout", *OURS)}
    limits = {f"{cluster}_{key}": value for key, value in options.items() if key == "max_num_timeout"}
    try:
        executor = submitit.AutoExecutor(options["submitit_folder"], cluster=cluster, **limits)
    except RuntimeError:
        raise UserError("hardware=slurm_*: there is no SLURM here (srun not found); submit from a login node.") from None
    executor.update_parameters(**{k if k in shared else f"{cluster}_{k}": value for k, value in parameters.items()})
    return executor


def import_this_copy() -> None:
    """Let jobs import this copy of the code wherever they were submitted from, and nothing from the folder they start in."""
    root, folders = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if not INSTALLED and root not in folders:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, folders)])
    os.environ["PYTHONSAFEPATH"] = "1"  # `hjepa.config.run` adds the working directory, as the last one
