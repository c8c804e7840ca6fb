"""Processes that `srun` has started, by the launcher or by a user: their places in the process group."""

import os
import random
import socket

from submitit.slurm.slurm import SlurmJobEnvironment


class StepJobEnvironment(SlurmJobEnvironment):
    """The environment of a task of `srun`, which may use a part of its job only."""

    _env = SlurmJobEnvironment._env | {
        "num_tasks": "SLURM_STEP_NUM_TASKS",
        "num_nodes": "SLURM_STEP_NUM_NODES",
        "nodes": "SLURM_STEP_NODELIST",
    }


def adopt_slurm() -> None:
    """Set the environment variables of torchrun from those of SLURM's tasks; an address that the user has set is kept."""
    tasks = StepJobEnvironment()
    os.environ |= {
        "RANK": str(tasks.global_rank),
        "LOCAL_RANK": str(tasks.local_rank),
        "WORLD_SIZE": str(tasks.num_tasks),
        "LOCAL_WORLD_SIZE": str(tasks.num_tasks // tasks.num_nodes),
    }
    os.environ.setdefault("MASTER_ADDR", main_address(tasks))
    step = f"{tasks.raw_job_id}.{os.environ.get('SLURM_STEP_ID', '')}"
    os.environ.setdefault("MASTER_PORT", str(random.Random(step).randint(20000, 60000)))  # the same for all tasks


def main_address(tasks: SlurmJobEnvironment) -> str:
    """Return the address of the machine of the main process."""
    if tasks.num_nodes == 1:
        return "127.0.0.1"
    name = str(tasks.hostnames[0])
    try:
        socket.gethostbyname(name)
    except OSError:  # a name that does not resolve would fail only after minutes
        return os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    return name
