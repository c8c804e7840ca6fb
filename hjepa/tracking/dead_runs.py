"""Detection of runs that MLflow lists as running although they are dead, since a killed process cannot report its end.

A process that works on a run holds the lock of the run folder. A run is considered dead if this lock is free and can be relied
on: on the machine where the run was started, or on a file system that shares locks between machines.
"""

import contextlib
import platform
import time
from pathlib import Path
from typing import Any

from hjepa.tracking.run_folder import read_run_id, try_lock
from hjepa.tracking.tracker import tracker_status

BOOT_ID, MOUNTS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/mounts")

SHARED_FILE_SYSTEMS = {"nfs", "nfs4", "ceph", "gpfs", "lustre"}  # share locks between machines, except with these options:

LOCAL_LOCK_OPTIONS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock"}


def machine_tags() -> dict[str, str]:
    """Return tags that identify this machine: its name and, because containers have their own names, the id of its boot."""
    return {"host": platform.node()} | ({"boot": BOOT_ID.read_text().strip()} if BOOT_ID.exists() else {})


def close_dead_runs(client: Any) -> None:
    """Set the final status of all dead runs whose folders are on this machine.

    Args:
        client: An MlflowClient.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, "attributes.status = 'RUNNING' and tags.run_folder LIKE '/%'"):
        with contextlib.suppress(OSError):  # such as for the folder of another user
            close_if_dead(client, run)


def close_if_dead(client: Any, run: Any) -> None:
    """Set the final status of a run if it is known to be dead."""
    tags, folder = run.data.tags, Path(run.data.tags["run_folder"])
    current_id = read_run_id(folder)  # of the run that the folder holds now
    is_current = current_id in (run.info.run_id, tags.get("copy_of"))
    same_machine = any(tags.get(key) == value for key, value in machine_tags().items())
    if not (folder / ".lock").exists() or not (same_machine or (is_current and shares_locks(folder))):
        return
    if current_id and not is_current:  # another run has replaced it
        end_run(client, run.info.run_id, folder, "KILLED")
        return
    with try_lock(folder) as is_free:
        if is_free:
            end_run(client, run.info.run_id, folder, tracker_status(folder))


def end_run(client: Any, run_id: str, folder: Path, status: str) -> None:
    """Set the final status of a run, and as its end the time when its folder was last written."""
    files = [folder / name for name in ("config.yaml", "metrics.jsonl", "summary.json")]
    last_written = max((file.stat().st_mtime for file in files if file.exists()), default=time.time())
    client.set_terminated(run_id, status, end_time=int(1000 * last_written))


def shares_locks(folder: Path, mounts: Path = MOUNTS) -> bool:
    """Return whether all machines with access to a folder see the same locks, according to the table of mounts."""
    longest, shared = -1, False
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, kind, options = line.split()[:4]
        if folder.is_relative_to(point) and len(point) >= longest:
            flags = set(options.split(","))
            longest = len(point)
            shared = kind in SHARED_FILE_SYSTEMS and not flags & LOCAL_LOCK_OPTIONS and (kind != "lustre" or "flock" in flags)
    return shared
