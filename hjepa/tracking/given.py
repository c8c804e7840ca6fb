"""What is made of a run after its end, given to the trackers that have the run."""

from pathlib import Path

from hjepa.config import Config
from hjepa.folder import read_config, read_summary
from hjepa.tracking.trackers import Addition, build_trackers


def give(config: Config, run: Path, addition: Addition) -> None:
    """Give something to the run's own trackers; nothing where either the run or this command has none.

    Args:
        config: of this command; run: the run's folder.
    """
    run_id = read_summary(run).get("run_id")
    if run_id and config["tracking"]:
        build_trackers(read_config(run)["tracking"]).add(run_id, addition)
