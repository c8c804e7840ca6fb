"""Trackers: a run's parameters, metrics and files where they can be looked at, copied from the run folder.

metrics.jsonl is the truth: a tracker is given every record once, and what it already has (of an earlier sitting) it does not
take twice. A tracking fault never stops training: the user is told once. A tracker's package is imported on use.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hjepa.config.instantiate import build
from hjepa.config.schema import Config
from hjepa.tracking.run_folder import Record, read_config, read_summary

log = logging.getLogger(__name__)

# What a tracker calls the end of a run whose summary.json has this status; without one it was killed.
TRACKER_STATUS = {
    "finished": "FINISHED",
    "collapsed": "FINISHED",
    "failed": "FAILED",
    "stopped": "KILLED",
    "requeued": "SCHEDULED",
}


@dataclass(frozen=True)
class Artifacts:
    """What a run is given after its end: files, for a folder of its artifacts, tags, and metrics of one of its steps."""

    files: list[Path]
    folder: str
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0


class Tracker:
    """The interface; this one keeps nothing."""

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        """Start or resume the tracked run of a run folder, which has these records so far.

        Returns:
            The run's id, where the tracker has one that the summary should name.
        """
        return None

    def log(self, record: Record) -> None:
        """Send a record {"step": int, name: number, ...} that metrics.jsonl already holds."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Send a file."""

    def finish(self, status: str) -> bool:
        """End the run as one of `TRACKER_STATUS` after everything was sent; returns whether it was."""
        return True

    def add_artifacts(self, run_id: str, addition: Artifacts) -> None:
        """Give something to a run that has ended; what it has already is not there twice."""

    def view_command(self) -> str | None:
        """The command that shows the run, or None."""
        return None


class Trackers(Tracker):
    """Several trackers (or none) as one; one that fails is left out from then on.

    Args:
        members: by the name of their option.
    """

    def __init__(self, members: dict[str, Tracker]) -> None:
        self.members = members

    def each(self, call: Callable[[Tracker], Any]) -> list[Any]:
        """The results of a call of every tracker that works."""
        results = []
        for name, tracker in list(self.members.items()):
            try:
                results.append(call(tracker))
            except Exception as error:  # whatever a tracker does, training goes on
                del self.members[name]
                results.append(None)
                log.warning("tracking=%s failed (%s) and is left out; metrics.jsonl keeps everything", name, error)
        return results

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        ids = self.each(lambda tracker: tracker.start(folder, experiment, params, tags, records))
        return next((run_id for run_id in ids if run_id), None)

    def log(self, record: Record) -> None:
        self.each(lambda tracker: tracker.log(record))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.each(lambda tracker: tracker.artifact(path, folder))

    def finish(self, status: str) -> bool:
        return all(self.each(lambda tracker: tracker.finish(status)))

    def add_artifacts(self, run_id: str, addition: Artifacts) -> None:
        self.each(lambda tracker: tracker.add_artifacts(run_id, addition))

    def view_command(self) -> str | None:
        return "\n  or ".join(command for command in self.each(lambda tracker: tracker.view_command()) if command) or None


def build_trackers(options: Config) -> Trackers:
    """The trackers of the config's `tracking` node, one per option chosen."""
    return Trackers({name: build(node) for name, node in options.items()})


def log_artifacts(config: Config, run: Path, addition: Artifacts) -> None:
    """Give something to the run's own trackers; nothing where either the run or this command has none.

    Args:
        config: of this command; run: the run's folder.
    """
    run_id = read_summary(run).get("run_id")
    if run_id and config["tracking"]:
        build_trackers(read_config(run)["tracking"]).add_artifacts(run_id, addition)
