"""A real SLURM cluster for the tests: slurmctld and four virtual nodes on this machine, which run during the test session.

The partition `lab` consists of node1 and node2, with two fake GPUs each. On node3, jobs of the partition `scavenge` are requeued
after a grace period when a job of the partition `urgent` needs the node. node4, the partition `fragile`, may die. All ports are
free ones, so that several clusters can run at the same time.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

NODES = ("node1", "node2", "node3", "node4")
GRACE_SECONDS = 5  # between the signal to a preempted job and its end
CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A job is requeued after its credential has expired, by default after two minutes. It must not expire before the job has started,
# which takes seconds on a busy machine.
AuthInfo=cred_expire=20
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=lab Nodes=node1,node2 Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF
PartitionName=scavenge Nodes=node3 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=fragile Nodes=node4 PreemptMode=OFF
PartitionName=urgent Nodes=node3 PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 Gres=gpu:2 Feature=virtual"


def free_ports(count: int) -> list[int]:
    """Return unused ports below the range of outgoing connections."""
    with ExitStack() as stack:
        ports: list[int] = []
        for port in range(10000 + 20 * (os.getpid() % 1000), 32000):  # different for test sessions that start at the same time
            connection = stack.enter_context(socket.socket())
            if connection.connect_ex(("127.0.0.1", port)):
                ports.append(port)
            if len(ports) == count:
                return ports
    raise OSError("no free ports")


def poll(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a condition holds, and fail after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)


def slurm(*command: str, check: bool = True) -> str:
    """Return the output of a SLURM command."""
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=60).stdout.strip()


def job_fields(job: str) -> dict[str, str]:
    """Return the fields that `scontrol show job` prints."""
    return dict(field.partition("=")[::2] for field in slurm("scontrol", "show", "job", "-o", job).split())


def process_of(job: str) -> int:
    """Return the process id of the only task of a running job of this cluster."""
    variables = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_CONF": os.environ["SLURM_CONF"]}
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if "submitit.core._submit" in command and variables.items() <= environment.items():
            return process.pid
    pytest.fail(f"job {job} has no process")


def let_node_die(name: str, folder: Path) -> None:
    """Kill all processes of a node, let the controller notice, and start the node again.

    Args:
        name: Name of the node.
        folder: Folder of the cluster.
    """
    daemon = psutil.Process(int((folder / f"slurmd.{name}.pid").read_text()))
    tasks = [process for process in psutil.process_iter(["environ"]) if runs_on(name, process.info["environ"] or {})]
    managers = {parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")}
    # None may notice the end of another: srun would ask the controller to kill its tasks, and the controller, if it does not get
    # an answer, tries again a minute later, when the job has already started anew. Children end first, because Linux continues
    # the suspended children of a process that ends.
    processes = [daemon, *managers, *tasks]
    for process in processes:
        process.suspend()
    for process in sorted(processes, key=lambda process: (process.create_time(), process.pid), reverse=True):
        process.kill()
    slurm("scontrol", "update", f"nodename={name}", "state=down", "reason=died")  # as after SlurmdTimeout
    slurm("slurmd", "-N", name)
    slurm("scontrol", "update", f"nodename={name}", "state=resume", check=False)  # an error if it has returned by itself


def runs_on(node: str, environment: dict[str, str]) -> bool:
    """Return whether a process with an environment runs on a node of this cluster."""
    return environment.get("SLURMD_NODENAME") == node and environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]


def write_config(folder: Path, options: str) -> Path:
    """Write slurm.conf, with further options, and gres.conf to a folder, and return the path of slurm.conf."""
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    port, *ports = free_ports(1 + len(NODES))
    nodes = "\n".join(NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True))
    config = folder / "slurm.conf"
    text = CONFIG.format(host=host, user=user, port=port, folder=folder, nodes=nodes, grace=GRACE_SECONDS)
    config.write_text(text + options)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # fake GPUs, which are never opened
    (folder / "state").mkdir()
    return config


def stop(folder: Path) -> None:
    """Cancel all jobs and stop the daemons."""
    slurm("scancel", "--user", getpass.getuser(), check=False)
    poll(lambda: not slurm("squeue", "-h", check=False), 60, "end of all jobs")
    stop_daemons(folder)


def stop_daemons(folder: Path) -> None:
    """Stop the daemons that have written their process ids to a folder, the controller last."""
    for pattern in ("slurmd*.pid", "slurmctld.pid"):
        pids = [int(file.read_text()) for file in folder.glob(pattern)]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        poll(lambda pids=pids: not any(psutil.pid_exists(pid) for pid in pids), 20, f"end of {pattern}")


@contextmanager
def run_cluster(folder: Path, options: str = "") -> Iterator[Path]:
    """Start a cluster for the SLURM commands of this process and its children.

    Args:
        folder: Folder of its configuration and logs.
        options: Further lines of slurm.conf.

    Yields:
        The folder.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(write_config(folder, options)))
        try:
            slurm("slurmctld", "-c")
            for node in NODES:
                slurm("slurmd", "-N", node)
            poll(lambda: {*slurm("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()} == {*NODES}, 30, "idle nodes")
            yield folder
        finally:
            stop(folder)


def require_commands(what: str, commands: Sequence[str], packages: str) -> None:
    """Skip a test of something where the commands that it needs are not installed."""
    if missing := [command for command in commands if not shutil.which(command)]:
        pytest.skip(f"NO SLURM HERE ({', '.join(missing)} missing): {what} was NOT tested; install {packages}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a cluster without accounting; return the folder of its logs."""
    commands = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
    require_commands("hardware=slurm_*", commands, "slurmctld slurmd")
    with run_cluster(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder
