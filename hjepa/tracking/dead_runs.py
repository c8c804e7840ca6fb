"""Runs that MLflow believes to be running although nobody works on them: a killed process cannot say that it ended.

Whoever holds the lock of a run's folder works on it. A run is called dead only where that lock is free and can be relied on:
on the machine that the run was on, or on a file system whose locks are the same on every machine.
"""

import platform
import time
from pathlib import Path
from typing import Any

from hjepa.tracking.run_folder import read_summary, try_lock
from hjepa.tracking.tracker import TRACKER_STATUS

BOOT, MOUNTS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/mounts")

SHARED = {"nfs", "nfs4", "ceph", "gpfs", "lustre"}  # their locks reach across machines, unless an option says otherwise

LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock"}


def machine_tags() -> dict[str, str]:
    """What tells this machine from others: its name and, as containers have names of their own, its boot."""
    return {"host": platform.node()} | ({"boot": BOOT.read_text().strip()} if BOOT.exists() else {})


def close_dead_runs(client: Any) -> None:
    """Give every dead run that MLflow calls running, and whose folder is here, the end that it came to.

    Args:
        client: an MlflowClient.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, "attributes.status = 'RUNNING' and tags.run_folder LIKE '/%'"):
        close_if_dead(client, run)


def close_if_dead(client: Any, run: Any) -> None:
    """Close one run, if that can be decided here."""
    tags, folder = run.data.tags, Path(run.data.tags["run_folder"])
    file = folder / "run_id"
    holds = file.read_text() if file.exists() else None  # the id of the run that the folder holds now
    is_its = holds in (run.info.run_id, tags.get("copy_of"))
    here = any(tags.get(key) == value for key, value in machine_tags().items())
    if not (folder / ".lock").exists() or not (here or (is_its and locks_reach(folder))):
        return
    if holds and not is_its:  # another run has taken its place
        end_run(client, run.info.run_id, folder, "KILLED")
        return
    with try_lock(folder) as free:
        if free:
            end_run(client, run.info.run_id, folder, TRACKER_STATUS.get(read_summary(folder).get("status", ""), "KILLED"))


def end_run(client: Any, run_id: str, folder: Path, status: str) -> None:
    """Set a run's final status; it ended when the last was written of what tells its story."""
    story = [folder / name for name in ("config.yaml", "metrics.jsonl", "summary.json")]
    last = max((file.stat().st_mtime for file in story if file.exists()), default=time.time())
    client.set_terminated(run_id, status, end_time=int(1000 * last))


def locks_reach(folder: Path, mounts: Path = MOUNTS) -> bool:
    """Whether a lock in this folder is seen on every machine that has the folder, by the table of mounted file systems."""
    best, reach = -1, False
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, kind, options = line.split()[:4]
        if folder.is_relative_to(point) and len(point) >= best:
            flags = set(options.split(","))
            best, reach = len(point), kind in SHARED and not flags & LOCAL_LOCKS and (kind != "lustre" or "flock" in flags)
    return reach
