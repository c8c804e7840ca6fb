"""Results of an evaluation in evaluate/summary.json, which is written after every protocol so that it can be continued.

status        finished, or unfinished while protocols are missing
run, run_id, experiment, seed
checkpoint    hash of the checkpoint that was evaluated last
protocols     protocols of the last evaluation
checkpoints   hash -> name, step, results; results: protocol -> key (hash of all that determines it), about, rows, percent
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hjepa.config.identity import identity, short_hash
from hjepa.tasks.evaluate.protocol import EvalContext, EvalProtocol, Scores
from hjepa.tasks.evaluate.tables import Result, aggregate_runs, result_table, runs_table, to_text
from hjepa.tasks.trained_run import TrainedRun
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import Record, check_writable, read_config, read_summary, remove


class Results:
    """The results of a run.

    Args:
        folder: The folder evaluate/ in the run's folder.
        run: Run.
    """

    def __init__(self, folder: Path, run: TrainedRun) -> None:
        for features in (folder / "features").glob("*"):
            if not features.name.startswith(run.hash):
                remove(features)  # features of another checkpoint, or incomplete ones
        self.folder = folder
        self.protocols: list[str] = []
        self.summary: Record = {
            "status": "unfinished",
            "run": run.folder.name,
            "run_id": read_summary(run.folder).get("run_id"),
            "experiment": run.config["experiment_name"],
            "seed": run.config["seed"],
            "checkpoint": run.hash,
            "protocols": [],
            "checkpoints": read_summary(folder).get("checkpoints", {}),
        }
        checkpoint = self.summary["checkpoints"].setdefault(run.hash, {"results": {}})
        checkpoint |= {"name": run.checkpoint.stem, "step": run.step}
        self.by_protocol: dict[str, Result] = checkpoint["results"]

    def select(self, protocols: list[str]) -> None:
        """Set the protocols of this evaluation."""
        self.protocols = self.summary["protocols"] = protocols

    def discard(self, protocols: list[str]) -> None:
        """Remove the results of some protocols for this checkpoint, and all features; other results stay."""
        for name in protocols:
            self.by_protocol.pop(name, None)
        self.write_summary()
        for features in (self.folder / "features").glob("*"):
            remove(features)

    def has(self, name: str, protocol: EvalProtocol, context: EvalContext) -> bool:
        """Return whether a protocol was computed with this checkpoint, these options and these images."""
        return name in self.by_protocol and bool(self.by_protocol[name]["key"] == protocol.key(context))

    def add(self, name: str, protocol: EvalProtocol, context: EvalContext) -> None:
        """Compute a protocol and store its scores."""
        title, rows = protocol.describe(context), protocol.score(context)
        self.by_protocol[name] = {"key": protocol.key(context), "about": title, "rows": rows, "percent": protocol.percent}
        self.write_summary()

    def finish(self) -> None:
        """Mark the evaluation as finished, and write summary.json and table.txt."""
        self.summary["status"] = "finished"
        self.write_summary()
        atomic_write(self.folder / "table.txt", "\n\n".join(map(self.table, self.protocols)) + "\n")

    def write_summary(self) -> None:
        """Write summary.json."""
        atomic_write(self.folder / "summary.json", json.dumps(self.summary, indent=2) + "\n")

    def rows(self, name: str) -> Scores:
        """Return the scores of a protocol."""
        return self.by_protocol[name]["rows"]

    def table(self, name: str) -> str:
        """Return the scores of a protocol as text."""
        result = self.by_protocol[name]
        return to_text(result["about"], result_table(name, result))

    def linear_accuracy(self) -> float | None:
        """Return the linear accuracy of the trained encoder's features for the main label, None if it was not computed."""
        return next(iter(next(iter(self.rows("linear").values())).values())) if "linear" in self.protocols else None

    def metrics(self) -> dict[str, float]:
        """Return all scores under flat names for trackers, such as evaluate/linear/trained/block 6/class."""
        return {
            f"evaluate/{protocol}/{source}/{column}": value
            for protocol in self.protocols
            for source, columns in self.rows(protocol).items()
            for column, value in columns.items()
        }


def aggregate_seeds(root: Path, results: dict[Path, Results]) -> None:
    """Print runs that differ only in their seeds with their means, and write them to evaluate/ in the folder of the runs."""
    blocks: list[str] = []
    groups: list[dict[str, Any]] = []
    for folders in group_by_seed(list(results)):
        if len(folders) < 2:
            continue
        runs = [results[folder] for folder in folders]
        names = [f"seed {run.summary['seed']}" for run in runs]
        blocks.append(f"{len(runs)} runs that differ only in their seeds: {', '.join(folder.name for folder in folders)}")
        means = {}
        for protocol in [name for name in runs[0].protocols if all(name in run.protocols for run in runs)]:
            by_run = {name: run.by_protocol[protocol] for name, run in zip(names, runs, strict=True)}
            means[protocol] = aggregate_runs({name: result["rows"] for name, result in by_run.items()})
            title = f"{runs[0].by_protocol[protocol]['about']}; mean and standard deviation over the runs"
            blocks.append(to_text(title, runs_table(protocol, by_run)))
        groups.append({"runs": [str(folder) for folder in folders], "means": means})
    if groups:
        folder = root / "evaluate"
        check_writable(folder, "make it writable")
        folder.mkdir(exist_ok=True)
        atomic_write(folder / "summary.json", json.dumps({"status": "finished", "groups": groups}, indent=2) + "\n")
        atomic_write(folder / "table.txt", "\n\n".join(blocks) + "\n")
        print("\n" + "\n\n".join(blocks) + f"\n\nOver the seeds: {folder}/summary.json and table.txt", flush=True)


def group_by_seed(folders: Sequence[Path]) -> list[list[Path]]:
    """Return run folders in groups whose configs differ only in their seeds; of copies of a run, one is kept with a note."""
    groups: dict[str, dict[int, Path]] = {}
    for folder in folders:
        config = identity(read_config(folder))
        kept = groups.setdefault(short_hash(config | {"seed": None}), {}).setdefault(config["seed"], folder)
        if kept != folder:
            print(f"{folder} has the config and the seed of {kept}, and is left out of the statistics over seeds.")
    return [list(group.values()) for group in groups.values()]
