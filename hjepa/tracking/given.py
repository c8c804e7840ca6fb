"""What is made of a run after its end, given to the trackers that have the run."""

from pathlib import Path

from hjepa.config import Config
from hjepa.folder import read_config, read_summary
from hjepa.tracking.trackers import build_trackers


def give(
    config: Config, run: Path, files: list[Path], place: str, metrics: dict[str, float] | None = None, step: int = 0
) -> None:
    """Give files to the run's own trackers, to a folder `place` there; nothing where either the run or this command has none.

    Args:
        config: of this command; run: the run's folder; metrics: of its step `step`.
    """
    run_id = read_summary(run).get("run_id")
    if run_id and config["tracking"]:
        build_trackers(read_config(run)["tracking"]).add(run_id, {}, files, place, metrics, step)
