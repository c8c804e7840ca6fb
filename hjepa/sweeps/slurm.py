"""The jobs of a sweep on SLURM: submitted as one array, followed until the last has ended, reported in one table.

What was submitted is what runs: a job is its resolved config and the folder of its run, pickled at submission. The code is read
when the job starts; if it is not the code of the submission, the run says so and is tagged.
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
from hjepa.config.run import perform
from hjepa.config.schema import Config, check_node
from hjepa.sweeps.job import Job
from hjepa.sweeps.plan import plan_jobs
from hjepa.sweeps.slurm_queue import SlurmQueue, accounting
from hjepa.sweeps.sweep import Sweep
from hjepa.tracking.provenance import SUBMITTED, git_state

log = logging.getLogger(__name__)

LOGS = "slurm"  # in the sweep folder


@dataclass(frozen=True)
class SlurmOptions:
    """What to ask SLURM for; see conf/hydra/launcher/slurm.yaml. Memory is per node; None leaves a choice to the cluster."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodes: int
    tasks_per_node: int
    gpus_per_node: int | None
    cpus_per_task: int | None
    mem_gb: float | None
    timeout_min: int
    signal_delay_s: int
    max_num_timeout: int
    array_parallelism: int
    setup: list[str]
    sbatch: dict[str, Any]
    wait: bool
    poll_seconds: float

    def __post_init__(self) -> None:
        for option in ("nodes", "tasks_per_node", "timeout_min", "signal_delay_s", "array_parallelism", "poll_seconds"):
            if getattr(self, option) <= 0:
                raise UserError(f"hydra.launcher.{option}={getattr(self, option)}: expected more than 0.")
        if self.signal_delay_s > 30 * self.timeout_min:
            raise UserError(
                f"hydra.launcher.signal_delay_s={self.signal_delay_s} is more than half of timeout_min={self.timeout_min}: a job "
                "would hardly start before it is told to save and queue again; lower the one or raise the other."
            )

    def check_process_count(self, processes: int | None) -> None:
        """Refuse a `hardware.processes` other than the number of tasks: SLURM starts the processes, and tells each to stop."""
        tasks = self.nodes * self.tasks_per_node
        if processes not in (None, tasks):
            raise UserError(
                f"hardware.processes={processes}, but a job has {tasks} tasks (hydra.launcher.nodes x tasks_per_node), each of "
                f"which is a process; make them equal, as in hydra.launcher.tasks_per_node={processes}."
            )

    def executor(self, folder: Path) -> submitit.SlurmExecutor:
        """submitit's way to these resources; scripts, pickles and logs go to the folder."""
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=self.max_num_timeout)
        except RuntimeError:
            raise UserError("hardware=slurm_*: there is no SLURM here (srun not found); submit from a login node.") from None
        given = {
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
            srun_args=["--kill-on-bad-exit=1"],  # processes that wait for a failed one would wait for ever
            additional_parameters={"requeue": True, **self.sbatch},
            **{option: value for option, value in given.items() if value is not None},
        )
        return executor


@dataclass
class Task:
    """What a job does, pickled at submission.

    Args:
        config: resolved and checked; path: of its run folder; composed: with Hydra's own part; code: see `git_state`.
    """

    config: Config
    path: Path
    composed: DictConfig
    code: dict[str, str]

    def __call__(self) -> float | None:
        HydraConfig.instance().set_config(self.composed)
        configure_log(self.composed.hydra.job_logging)
        logging.getLogger("submitit").propagate = False  # it writes to the log itself
        os.environ[SUBMITTED] = json.dumps(self.code)
        return perform(self.config, self.path)

    def checkpoint(self) -> DelayedSubmission:
        """What a requeued job does: the same, which continues the run."""
        return DelayedSubmission(self)


def launch(
    options: dict[str, Any], loader: ConfigLoader, master: DictConfig, overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Submit the jobs that are not done yet as one array and, with `wait`, follow them to their end.

    Args:
        options: of `SlurmOptions`; loader, master: Hydra's, the config of the sweep; overrides: of each job; first: first number.

    Raises:
        UserError: SLURM refused the jobs, or one did not come to its end.
    """
    check_node("hydra.launcher", {"_target_": f"{__name__}.SlurmOptions", **options})
    cluster = SlurmOptions(**options)
    sweep = Sweep(Path(master.hydra.sweep.dir).expanduser().absolute())
    executor = cluster.executor(sweep.folder / LOGS)
    jobs = plan_jobs(loader, master, overrides, first)
    waiting = [job for job in jobs if not job.is_done]
    for job in waiting:
        cluster.check_process_count(job.config["hardware"]["processes"])
    if waiting:
        submit(waiting, executor)
        sweep.write(jobs)
    try:
        if waiting:
            announce(waiting, sweep)
            if not accounting([job.slurm_id for job in waiting]):
                log.warning("sacct does not answer here: what becomes of the jobs is learned from squeue and the run folders")
        if waiting and not cluster.wait:
            return []
        queue = SlurmQueue(waiting, executor.folder, cluster.nodes * cluster.tasks_per_node)
        queue.follow(cluster.poll_seconds, changed=lambda: sweep.write(jobs))
    except KeyboardInterrupt:
        print("\nInterrupted. The jobs go on without this command.", file=sys.stderr)
        announce([job for job in waiting if not job.is_done], sweep)
        raise SystemExit(130) from None
    sweep.end(jobs)
    return sweep.returns(jobs)


def submit(jobs: list[Job], executor: submitit.SlurmExecutor) -> None:
    """Submit jobs, as an array if there are several; each learns its id and its log."""
    root = str(Path(__file__).resolve().parents[2])  # a job imports this code, wherever it was submitted from
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    tasks = []
    for job in jobs:
        assert job.folder is not None, "a job without a folder has failed"
        tasks.append(Task(job.config, job.folder, job.composed, git_state()))
    try:
        submitted = executor.submit_array(tasks)
    except FailedJobError as error:
        raise UserError(f"SLURM refused the jobs: {' '.join(str(error.__cause__ or error).split())}.") from None
    for job, sent in zip(jobs, submitted, strict=True):
        job.slurm_id, job.log = sent.job_id, sent.paths.stdout


def announce(jobs: list[Job], sweep: Sweep) -> None:
    """Say which jobs there are, where to look, and how to end them."""
    ids = sorted({job.slurm_id.split("_")[0] for job in jobs})
    print(f"SLURM jobs and their run folders (logs: {sweep.folder / LOGS}):")
    for job in jobs:
        print(f"  {job.slurm_id:>8}  {job.folder}")
    print(f"Their table at any time: python launch.py task=sweep task.folder={sweep.folder}")
    print(f"To end them all: scancel {' '.join(ids)}", flush=True)
