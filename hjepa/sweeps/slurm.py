"""The SLURM launcher: submits the jobs of a sweep as one array, follows them until the last has ended, and prints their table.

A submitted job is fixed: its resolved config and its run folder are pickled at submission. The code, however, is read when the
job starts. If it has changed since the submission, the run logs a warning and is tagged.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log
from omegaconf import DictConfig
from submitit.core.utils import FailedJobError
from submitit.helpers import DelayedSubmission

from hjepa.config.errors import UserError
from hjepa.config.paths import PROGRAM
from hjepa.config.run import perform
from hjepa.config.schema import Config, check_node
from hjepa.config.types import NonNegativeInt, PositiveFloat, PositiveInt
from hjepa.sweeps.job import Job
from hjepa.sweeps.plan import plan_jobs
from hjepa.sweeps.slurm_queue import SlurmQueue, accounting_states
from hjepa.sweeps.sweep import Sweep
from hjepa.tracking.provenance import SUBMITTED_VARIABLE, git_state

log = logging.getLogger(__name__)

SLURM_FOLDER = "slurm"  # scripts, pickles and logs, in the sweep folder


@dataclass(frozen=True)
class SlurmOptions:
    """Resources to request from SLURM; conf/hydra/launcher/slurm.yaml describes each. None: the cluster's default."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodes: PositiveInt
    tasks_per_node: PositiveInt
    gpus_per_node: NonNegativeInt | None
    cpus_per_task: PositiveInt | None
    mem_gb: PositiveFloat | None
    timeout_min: PositiveInt
    signal_delay_s: PositiveInt
    max_num_timeout: NonNegativeInt
    array_parallelism: PositiveInt
    setup: list[str]
    sbatch: dict[str, Any]
    wait: bool
    poll_seconds: PositiveFloat

    def __post_init__(self) -> None:
        if self.signal_delay_s > 30 * self.timeout_min:
            raise UserError(
                f"hydra.launcher.signal_delay_s={self.signal_delay_s} is more than half of timeout_min={self.timeout_min}: a job "
                "would save and go back to the queue soon after its start; lower signal_delay_s or raise timeout_min."
            )

    def check_process_count(self, processes: int | None) -> None:
        """Raise a UserError unless `hardware.processes` is the number of tasks, since SLURM starts and signals each process."""
        tasks = self.nodes * self.tasks_per_node
        if processes not in (None, tasks):
            raise UserError(
                f"hardware.processes={processes}, but a job has {tasks} tasks (hydra.launcher.nodes x tasks_per_node), each of "
                f"which is a process; make them equal, as in hydra.launcher.tasks_per_node={processes}."
            )

    def executor(self, folder: Path) -> submitit.SlurmExecutor:
        """Return a submitit executor for these resources that writes scripts, pickles and logs to the folder."""
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=self.max_num_timeout)
        except RuntimeError:
            raise UserError("hardware=slurm_*: there is no SLURM here (srun not found); submit from a login node.") from None
        optional = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "gpus_per_node": self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem": f"{round(1024 * self.mem_gb)}M" if self.mem_gb else None,
        }
        executor.update_parameters(
            job_name="hjepa",
            nodes=self.nodes,
            ntasks_per_node=self.tasks_per_node,
            time=self.timeout_min,
            signal_delay_s=self.signal_delay_s,
            array_parallelism=self.array_parallelism,
            setup=self.setup,
            stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1"],  # otherwise processes would wait forever for one that failed
            additional_parameters={"requeue": True, **self.sbatch},
            **{option: value for option, value in optional.items() if value is not None},
        )
        return executor


@dataclass
class Task:
    """The function that a job calls, pickled at submission.

    Attributes:
        config: The resolved and checked config.
        path: The run folder.
        composed: The config as composed by Hydra, including the `hydra` node.
        code: State of the code at submission; see `git_state`.
    """

    config: Config
    path: Path
    composed: DictConfig
    code: dict[str, str]

    def __call__(self) -> float | None:
        HydraConfig.instance().set_config(self.composed)
        configure_log(self.composed.hydra.job_logging)
        logging.getLogger("submitit").propagate = False  # it has a handler of its own
        os.environ[SUBMITTED_VARIABLE] = json.dumps(self.code)
        return perform(self.config, self.path)

    def checkpoint(self) -> DelayedSubmission:
        """Return the function that a requeued job calls: the same one, which continues the run."""
        return DelayedSubmission(self)


def launch(
    options: dict[str, Any], loader: ConfigLoader, sweep_config: DictConfig, overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Submit all jobs that are not done yet as one array and, with the option `wait`, follow them until they end.

    Args:
        options: Options of `SlurmOptions`.
        loader: Hydra's config loader.
        sweep_config: The config of the whole sweep.
        overrides: Overrides of each job.
        first: Number of the first job.

    Raises:
        UserError: SLURM refused the jobs, or a job did not finish.
    """
    check_node("hydra.launcher", {"_target_": f"{__name__}.SlurmOptions", **options})
    cluster = SlurmOptions(**options)
    sweep = Sweep(Path(sweep_config.hydra.sweep.dir).expanduser().absolute())
    executor = cluster.executor(sweep.folder / SLURM_FOLDER)
    jobs = plan_jobs(loader, sweep_config, overrides, first)
    pending = [job for job in jobs if not job.is_done]
    for job in pending:
        cluster.check_process_count(job.config["hardware"]["processes"])
    if pending:
        submit(pending, executor)
        sweep.save(jobs)
    try:
        if pending:
            print_jobs(pending, sweep)
            if not accounting_states([job.slurm_id for job in pending]):
                log.warning("sacct does not answer here: states of jobs are taken from squeue and the run folders")
        if pending and not cluster.wait:
            return []
        queue = SlurmQueue(pending, executor.folder, cluster.nodes * cluster.tasks_per_node)
        queue.follow(cluster.poll_seconds, on_change=lambda: sweep.save(jobs))
    except KeyboardInterrupt:
        print("\nInterrupted. The jobs continue without this command.", file=sys.stderr)
        print_jobs([job for job in pending if not job.is_done], sweep)
        raise SystemExit(130) from None
    sweep.summarize(jobs)
    return sweep.job_returns(jobs)


def submit(jobs: list[Job], executor: submitit.SlurmExecutor) -> None:
    """Submit jobs, as an array if there are several, and set their ids and logs."""
    root = str(Path(__file__).resolve().parents[2])  # jobs import this copy of the code, wherever they were submitted from
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    tasks = []
    for job in jobs:
        assert job.folder is not None, "a job without a folder has failed"
        tasks.append(Task(job.config, job.folder, job.composed, git_state()))
    try:
        submitted = executor.submit_array(tasks)
    except FailedJobError as error:
        raise UserError(f"SLURM refused the jobs: {' '.join(str(error.__cause__ or error).split())}.") from None
    for job, submission in zip(jobs, submitted, strict=True):
        job.slurm_id, job.log = submission.job_id, submission.paths.stdout


def print_jobs(jobs: list[Job], sweep: Sweep) -> None:
    """Print jobs with their run folders, and how to view and cancel them."""
    ids = sorted({job.slurm_id.split("_")[0] for job in jobs})
    print(f"SLURM jobs and their run folders (logs: {sweep.folder / SLURM_FOLDER}):")
    for job in jobs:
        print(f"  {job.slurm_id:>8}  {job.folder}")
    print(f"To see their table at any time: {PROGRAM} task=sweep task.folder={sweep.folder}")
    print(f"To cancel them all: scancel {' '.join(ids)}", flush=True)
