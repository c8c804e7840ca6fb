"""A real SLURM for the tests: slurmctld and three virtual nodes of this machine, for the time of a test session.

Partitions: `lab` (node1, node2, two pretended GPUs each), and on node3 `scavenge`, whose jobs are requeued after a grace time
when `urgent` needs the node. Ports are free ones, so several clusters can be up side by side.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

NODES = ("node1", "node2", "node3")
GRACE = 5  # seconds that a preempted job has
CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A requeue waits until the old credential has expired, two minutes by default.
AuthInfo=cred_expire=5
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
PartitionName=urgent Nodes=node3 PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 Gres=gpu:2 Feature=virtual"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that outgoing connections take."""
    with ExitStack() as stack:
        ports: list[int] = []
        for port in range(10000 + 20 * (os.getpid() % 1000), 32000):  # far from those of a process that starts at the same time
            connection = stack.enter_context(socket.socket())
            if connection.connect_ex(("127.0.0.1", port)):
                ports.append(port)
            if len(ports) == count:
                return ports
    raise OSError("no free ports")


def poll(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Until the condition holds; fails after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)


def slurm(*command: str, check: bool = True) -> str:
    """The output of a SLURM command."""
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=60).stdout.strip()


def job_fields(job: str) -> dict[str, str]:
    """What the controller knows of a job: `scontrol show job`."""
    return dict(field.partition("=")[::2] for field in slurm("scontrol", "show", "job", "-o", job).split())


def process_of(job: str) -> int:
    """The process id of the (only) task of a job, 0 if there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended, or is somebody else's
            continue
        ours = f"SLURM_JOB_ID={job}\0".encode()
        if b"submitit.core._submit" in command and b"SLURM_STEP_ID=0" in environment and ours in environment:
            return int(folder.name)
    return 0


def write_config(folder: Path) -> Path:
    """slurm.conf and gres.conf in the folder."""
    host = socket.gethostname().split(".")[0]
    port, *ports = free_ports(1 + len(NODES))
    nodes = "\n".join(NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True))
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, user=getpass.getuser(), port=port, folder=folder, nodes=nodes, grace=GRACE))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # not opened  # pretended GPUs
    (folder / "state").mkdir()
    return config


def stop(folder: Path) -> None:
    """End all jobs and the daemons, the controller last."""
    slurm("scancel", "--user", getpass.getuser(), check=False)
    poll(lambda: not slurm("squeue", "-h", check=False), 60, "end of all jobs")
    for file in sorted(folder.glob("*.pid"), reverse=True):
        pid = int(file.read_text())
        os.kill(pid, signal.SIGTERM)
        poll(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20, f"end of {file.stem}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running cluster; the commands of this process and its children talk to it. Gives the folder of its logs."""
    missing = [
        command for command in ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol") if not shutil.which(command)
    ]
    if missing:
        pytest.skip(f"NO SLURM HERE ({', '.join(missing)} missing): hardware=slurm_* was NOT tested; install slurmctld slurmd")
    folder = tmp_path_factory.mktemp("slurm")
    os.environ["SLURM_CONF"] = str(write_config(folder))
    try:
        slurm("slurmctld", "-c")
        for node in NODES:
            slurm("slurmd", "-N", node)
        poll(lambda: {*slurm("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()} == {*NODES}, 30, "idle nodes")
        yield folder
    finally:
        stop(folder)
        del os.environ["SLURM_CONF"]
