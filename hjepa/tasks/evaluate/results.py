"""What an evaluation has found so far: evaluate/summary.json, kept after every protocol, so that an interrupted one goes on.

status        finished, or unfinished while protocols are missing
run, run_id, experiment, seed
checkpoint    hash of the one that was evaluated last
protocols     those that were asked for last
checkpoints   hash -> name, step, results; results: protocol -> key (digits of all that it is a function of), about, rows
"""

import json
import shutil
from pathlib import Path
from typing import Any

from hjepa.tasks.evaluate.protocol import Scores
from hjepa.tasks.evaluate.tables import table
from hjepa.tasks.trained_run import TrainedRun
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import Record, read_summary


class Results:
    """The results of a run.

    Args:
        folder: evaluate/ in the run's folder; anew: forget everything and remove the features.
    """

    def __init__(self, folder: Path, run: TrainedRun, anew: bool) -> None:
        if anew:
            (folder / "summary.json").unlink(missing_ok=True)
        for place in (folder / "features").glob("*"):
            if anew or not place.name.startswith(run.hash):
                shutil.rmtree(place)  # of another checkpoint, or half-written
        self.folder, self.hash = folder, run.hash
        self.run_id: str | None = read_summary(run.folder).get("run_id")
        self.protocols: list[str] = []
        self.summary: Record = {
            "status": "unfinished",
            "run": run.folder.name,
            "run_id": self.run_id,
            "experiment": run.config["experiment_name"],
            "seed": run.config["seed"],
            "checkpoint": run.hash,
            "protocols": [],
            "checkpoints": read_summary(folder).get("checkpoints", {}),
        }
        own = self.summary["checkpoints"].setdefault(run.hash, {"results": {}})
        own |= {"name": run.checkpoint.stem, "step": run.step}
        self.own: dict[str, Any] = own["results"]

    def ask(self, protocols: list[str]) -> None:
        """Note which protocols are wanted."""
        self.protocols = self.summary["protocols"] = protocols

    def has(self, protocol: str, key: str) -> bool:
        """Whether a protocol was done with this checkpoint and these options."""
        return bool(self.own.get(protocol, {}).get("key") == key)

    def keep(self, protocol: str, key: str, about: str, rows: Scores) -> None:
        """Keep what a protocol has found."""
        self.own[protocol] = {"key": key, "about": about, "rows": rows}
        self.write()

    def end(self) -> None:
        """Everything is there: write it, and the tables."""
        self.summary["status"] = "finished"
        self.write()
        atomic_write(self.folder / "table.txt", "\n\n".join(map(self.table, self.protocols)) + "\n")

    def write(self) -> None:
        """Write summary.json."""
        atomic_write(self.folder / "summary.json", json.dumps(self.summary, indent=2) + "\n")

    def rows(self, protocol: str) -> Scores:
        """What a protocol has found."""
        rows: Scores = self.own[protocol]["rows"]
        return rows

    def about(self, protocol: str) -> str:
        """What it was found on, in words."""
        return str(self.own[protocol]["about"])

    def table(self, protocol: str) -> str:
        """What a protocol has found as text."""
        return table(protocol, self.about(protocol), self.rows(protocol))

    def score(self) -> float | None:
        """The linear accuracy of the trained encoder's last block, the first row, by the main label."""
        return next(iter(next(iter(self.rows("linear").values())).values())) if "linear" in self.protocols else None

    def metrics(self) -> dict[str, float]:
        """Everything that was asked for, as flat names for trackers: evaluate/linear/trained/block 6/class."""
        return {
            f"evaluate/{protocol}/{source}/{column}": value
            for protocol in self.protocols
            for source, columns in self.rows(protocol).items()
            for column, value in columns.items()
        }
