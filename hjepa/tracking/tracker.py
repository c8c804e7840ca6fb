"""The interface of trackers, which copy a run's parameters, metrics and files from its run folder to where they can be viewed.

metrics.jsonl in the run folder is the reference. A tracker receives every record once, and must not duplicate what it already
has from an earlier session of the run. A failing tracker never stops training; it is reported once. To add a tracker, write a
subclass of `Tracker`, list it in this package's `__init__.pyi`, and add a YAML file to conf/tracking. Import the package of the
tracker in the constructor (`import_optional`), so that only its users need it.
"""

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build
from hjepa.config.passwords import hide_passwords
from hjepa.config.paths import PROGRAM
from hjepa.config.schema import Config
from hjepa.tracking.mlflow_server import database_path
from hjepa.tracking.run_folder import Record, read_config, read_run_id, read_summary

log = logging.getLogger(__name__)

# Status of a tracked run by the status in summary.json; a run without a summary was killed.
TRACKER_STATUS = {
    "finished": "FINISHED",
    "collapsed": "FINISHED",
    "failed": "FAILED",
    "stopped": "KILLED",
    "requeued": "SCHEDULED",
}


def tracker_status(folder: Path) -> str:
    """Return the status of a tracked run by the summary.json of its folder."""
    return TRACKER_STATUS.get(read_summary(folder).get("status", ""), "KILLED")


@dataclass(frozen=True)
class Artifacts:
    """Additions to a finished run.

    Attributes:
        files: Files to add.
        folder: Folder among the run's artifacts that receives the files.
        tags: Tags to set.
        metrics: Metrics to log.
        step: Training step of these metrics.
        run: Run folder; None where a sweep adds something to its runs.
    """

    files: list[Path]
    folder: str
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    run: Path | None = None


class Tracker:
    """The interface of all trackers; this base class does nothing."""

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        """Start or resume the tracked run of a run folder.

        Args:
            folder: Run folder.
            experiment: Name of the experiment, which groups runs.
            params: Flattened config.
            tags: Tags of the run, such as the commit of the code.
            records: All records of the run so far.

        Returns:
            The id of the tracked run if summary.json should name it.
        """
        return None

    def log(self, record: Record) -> None:
        """Send a record `{"step": int, name: number, ...}` that metrics.jsonl already holds."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Send a file, into a folder of the run's artifacts."""

    def log_histograms(self, file: Path) -> None:
        """Send a file of histograms (see `hjepa.tracking.histograms`) in the run folder."""

    def finish(self, status: str) -> bool:
        """Send everything that is pending, set one of `TRACKER_STATUS`, and return whether everything was sent."""
        return True

    def add_artifacts(self, run_id: str, artifacts: Artifacts) -> None:
        """Add artifacts, tags and metrics to a finished run; repeated calls must not duplicate anything.

        Args:
            run_id: What `start` has returned; empty if that was None.
            artifacts: Additions.
        """

    def view_command(self) -> str | None:
        """Return the command that shows the run, if there is one."""
        return None


class Trackers(Tracker):
    """Any number of trackers as one; a tracker that fails is left out from then on.

    Args:
        members: Trackers by the name of their option.
    """

    def __init__(self, members: dict[str, Tracker]) -> None:
        self.members = members
        self.has_failed = False
        self.folder: Path | None = None

    def call_each(self, call: Callable[[Tracker], Any]) -> list[Any]:
        """Call every working tracker and return the results, None for one that fails."""
        results = []
        for name, tracker in list(self.members.items()):
            try:
                results.append(call(tracker))
            except Exception as error:  # a tracker may raise anything, and training must go on
                del self.members[name]
                self.has_failed = True
                results.append(None)
                folder = shlex.quote(str(self.folder or "FOLDER"))
                log.warning(
                    "tracking=%s failed (%s) and is left out; the run folder keeps everything; %s task=sync run=%s tracking=%s "
                    "sends it later",
                    *(name, hide_passwords(str(error)), PROGRAM, folder, name),
                )
        return results

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        self.folder = folder
        ids = self.call_each(lambda tracker: tracker.start(folder, experiment, params, tags, records))
        return next((run_id for run_id in ids if run_id), None)

    def log(self, record: Record) -> None:
        self.call_each(lambda tracker: tracker.log(record))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self.call_each(lambda tracker: tracker.log_artifact(path, folder))

    def log_histograms(self, file: Path) -> None:
        self.call_each(lambda tracker: tracker.log_histograms(file))

    def finish(self, status: str) -> bool:
        return all(self.call_each(lambda tracker: tracker.finish(status))) and not self.has_failed

    def add_artifacts(self, run_id: str, artifacts: Artifacts) -> None:
        def add(tracker: Tracker) -> None:
            try:
                tracker.add_artifacts(run_id, artifacts)
            except UserError as error:  # the tracker lacks this run, and may have others
                run = run_id or artifacts.run
                log.warning("%s/ was not added to the tracked run %s: %s", artifacts.folder, run, hide_passwords(str(error)))

        self.folder = artifacts.run
        self.call_each(add)

    def view_command(self) -> str | None:
        commands = self.call_each(lambda tracker: tracker.view_command())
        return "\n  or ".join(command for command in commands if command) or None


def build_trackers(options: Config) -> Trackers:
    """Build the trackers of a config's `tracking` node."""
    return Trackers({name: build(node) for name, node in options.items()})


def log_artifacts(config: Config, folder: Path, artifacts: Artifacts) -> None:
    """Log artifacts of a finished run to its trackers, unless the run or the current command has none.

    Args:
        config: Config of the current command.
        folder: Run folder.
        artifacts: Additions to the run.
    """
    if config["tracking"]:
        run_id = read_run_id(folder) or ""
        build_trackers(trackers_of_run(config, folder)).add_artifacts(run_id, replace(artifacts, run=folder))


def register_model(config: Config, folder: Path) -> str:
    """Register the exported encoder of a run under the name `tracking.mlflow.register`, and return its URI.

    Args:
        config: Config of the current command.
        folder: Run folder.

    Raises:
        UserError: MLflow does not have the run.
    """
    node: Config = config["tracking"]["mlflow"] | trackers_of_run(config, folder).get("mlflow", {})
    tracker = build(node | {"register": config["tracking"]["mlflow"]["register"]})
    return str(tracker.register_model(read_run_id(folder) or "", folder / "export"))


def trackers_of_run(config: Config, folder: Path) -> Config:
    """Return the `tracking` node of a run, with the present address of each tracker.

    Args:
        config: Config of the current command.
        folder: Run folder.
    """
    nodes: Config = read_config(folder)["tracking"]
    return {name: node | present_address(node, config["tracking"].get(name, {})) for name, node in nodes.items()}


def present_address(node: Config, typed: Config) -> Config:
    """Return the options of the current command that take the place of those of a run.

    The command supplies the password that a run does not store, and the output root if that of the run was moved.

    Args:
        node: Options of a tracker in the config of a run.
        typed: Options of the same tracker in the current command.
    """
    uri, root = node.get("uri"), node.get("output_root")
    if uri:
        return {"uri": typed["uri"]} if hide_passwords(typed.get("uri")) == uri else {}
    was_moved = root and "output_root" in typed and not database_path(root).exists()
    return {"output_root": typed["output_root"]} if was_moved else {}
