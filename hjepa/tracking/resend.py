"""`task=sync run=...`: send runs to trackers from what they left in their folders, for a server that was away or is new.

What a tracker has already it does not get again, so the command can be repeated.
"""

import json
from pathlib import Path

from hjepa.config.identity import config_hash, flatten
from hjepa.config.schema import Config
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import UNSENT_MARKER, read_config, read_records, read_summary, try_lock
from hjepa.tracking.tracker import TRACKER_STATUS, build_trackers


def send(config: Config, folder: Path) -> bool:
    """Send one run; returns whether everything arrived. A run that is being worked on sends for itself."""
    with try_lock(folder) as free:
        if not free:
            print(f"{folder} is running and sends for itself.")
            return True
        arrived = deliver(config, folder)
    if arrived:
        print(f"{folder} is sent: {len(read_records(folder))} records.")
    return arrived


def deliver(config: Config, folder: Path) -> bool:
    """Send what is in a run folder that nobody works in; returns whether everything arrived. A summary that names no tracked
    run names it from then on.
    """
    run, summary, records = read_config(folder), read_summary(folder), read_records(folder)
    tracker = build_trackers({name: without_system_metrics(node) for name, node in config["tracking"].items()})
    tags = {key: str(summary[key]) for key in ("commit", "dirty") if summary.get(key) is not None}
    run_id = tracker.start(
        folder,
        run["experiment_name"],
        flatten(run) | flatten(summary.get("parameters", {}), "parameters"),
        tags | {"config": config_hash(run)},
        records,
    )
    if run_id and summary and not summary.get("run_id"):
        atomic_write(folder / "summary.json", json.dumps(summary | {"run_id": run_id}, indent=2) + "\n")
    tracker.artifact(folder / "config.yaml")
    tracker.artifact(folder / "summary.json")
    for plot in sorted((folder / "plots").glob("*.png")):
        tracker.artifact(plot, "plots")
    arrived = tracker.finish(TRACKER_STATUS.get(summary.get("status", ""), "KILLED"))
    if arrived:
        (folder / UNSENT_MARKER).unlink(missing_ok=True)
    return arrived


def without_system_metrics(node: Config) -> Config:
    """A tracker's options such that it does not measure this process, which is not the run's."""
    return node | ({"system_metrics": False} if "system_metrics" in node else {})
