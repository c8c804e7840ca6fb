"""Sending finished runs to trackers from their run folders; used by `task=sync`."""

import json
from pathlib import Path

from hjepa.config.identity import config_hash, flatten
from hjepa.config.passwords import hide_passwords
from hjepa.config.schema import Config
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.histograms import histogram_files
from hjepa.tracking.run_folder import UNSENT_MARKER, read_config, read_records, read_run_id, read_summary, try_lock
from hjepa.tracking.tracker import build_trackers, tracker_status


def send_run(config: Config, folder: Path, experiment: str | None = None) -> bool:
    """Send a run folder to the trackers of the config, and return whether everything arrived; running runs are skipped.

    Args:
        config: Config of the command.
        folder: Run folder.
        experiment: Experiment to send it to. None: that of the run.
    """
    with try_lock(folder) as is_free:
        if not is_free:
            print(f"{folder} is still running and sends its metrics itself.")
            return True
        arrived = send_idle_run(config, folder, experiment)
    if arrived:
        print(f"{folder} was sent: {len(read_records(folder))} records.")
    return arrived


def end_requeued_run(folder: Path, reason: str) -> None:
    """Record in summary and trackers that a run will not be continued although it went back to the queue of a cluster."""
    summary = read_summary(folder)
    if summary.get("status") == "requeued":
        atomic_write(folder / "summary.json", json.dumps(summary | {"status": "stopped", "reason": reason}, indent=2) + "\n")
        config = read_config(folder)
        if config["tracking"]:
            send_run(config, folder)


def send_idle_run(config: Config, folder: Path, experiment: str | None = None) -> bool:
    """Send a locked run folder, and return whether everything arrived; its summary then names the tracked run."""
    run, summary, records = read_config(folder), read_summary(folder), read_records(folder)
    tracker = build_trackers({name: without_system_metrics(node) for name, node in config["tracking"].items()})
    tags = {key: str(summary[key]) for key in ("commit", "dirty") if summary.get(key) is not None}
    params = flatten(hide_passwords(run)) | flatten(summary.get("parameters", {}), "parameters")
    run_id = tracker.start(folder, experiment or run["experiment_name"], params, tags | {"config": config_hash(run)}, records)
    run_id = read_run_id(folder) or run_id  # a tracked copy of the run has another id
    if run_id and summary and summary.get("run_id") != run_id:
        atomic_write(folder / "summary.json", json.dumps(summary | {"run_id": run_id}, indent=2) + "\n")
    tracker.log_artifact(folder / "config.yaml")
    tracker.log_artifact(folder / "summary.json")
    for pictures in ("plots", "visualize"):
        for picture in sorted((folder / pictures).glob("*.png")):
            tracker.log_artifact(picture, pictures)
    for file in histogram_files(folder):
        tracker.log_histograms(file)
    arrived = tracker.finish(tracker_status(folder))
    if arrived and run["tracking"].keys() <= config["tracking"].keys():  # other trackers of the run may still lack something
        (folder / UNSENT_MARKER).unlink(missing_ok=True)
    return arrived


def without_system_metrics(node: Config) -> Config:
    """Return a tracker's options without system metrics, because this process is not the run's."""
    return node | ({"system_metrics": False} if "system_metrics" in node else {})
