"""What a report says of a run, gathered from its folder."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hjepa.config.identity import flatten
from hjepa.config.schema import Config
from hjepa.plotting import CAPTIONS
from hjepa.tasks.evaluate.tables import grid
from hjepa.tasks.report.html import Picture, Table, tables
from hjepa.tracking.run_folder import Record, read_config, read_records, read_summary
from hjepa.training.summary import gains

CHOICES = (
    "model",
    "levels",
    "masking",
    "loss",
    "regularizer",
    "projector",
    "teacher",
    "optimizer",
    "schedule",
    "dataset",
    "train",
)

RUN_ENDS = {
    "stopped": "was stopped",
    "requeued": "was stopped and waits to go on",
    "failed": "FAILED",
    "collapsed": "COLLAPSED",
}


def run_facts(folder: Path) -> dict[str, Any]:
    """The facts of a run's page; also of a run that goes on, failed, or was never probed."""
    config, summary, records = read_config(folder), read_summary(folder), read_records(folder)
    pictures = find_pictures(folder)
    drawn = {picture.file.stem.partition("-")[0] for picture in pictures}
    return {
        "title": f"{config['experiment_name']} / {folder.name}",
        "folder": str(folder),
        "status": status(summary, records),
        "gains": gains(summary),
        "held_out": held_out(records),
        "curves": [picture for picture in pictures if picture.file.stem == "curves"],
        "pictures": [picture for picture in pictures if picture.file.stem != "curves"],
        "missing": [kind for kind in CAPTIONS if kind not in drawn],
        "evaluation": evaluation(folder),
        "cost": cost(summary),
        "choices": [choice(group, config[group]) for group in CHOICES if group in config],
        "config": OmegaConf.to_yaml(OmegaConf.create(config)),
        "origin": {key: summary.get(key) for key in ("command", "commit", "dirty")},
        "seed": config["seed"],
    }


def status(summary: Record, records: list[Record]) -> str:
    """How the run ended, in a sentence; empty where it is finished."""
    if not summary:
        return f"This run has not ended: it got to step {records[-1]['step'] if records else 0} so far."
    if summary["status"] == "finished":
        return ""
    reason = f": {summary['reason']}" if summary.get("reason") else ""
    return f"This run {RUN_ENDS.get(summary['status'], summary['status'])}{reason}."


def held_out(records: list[Record]) -> dict[str, float] | None:
    """The last held-out loss and that of predicting one constant vector; None where nothing is predicted."""
    last = next((record for record in reversed(records) if "validation/loss" in record), None)
    return last and {"loss": last["validation/loss"], "constant": last["validation/constant_loss"]}


def find_pictures(folder: Path) -> list[Picture]:
    """The pictures of a run folder by kind; those of task=visualize stand for the run's own of the same name."""
    files = {file.name: file for place in ("plots", "visualize") for file in sorted((folder / place).glob("*.png"))}
    order = list(CAPTIONS)

    def place(file: Path) -> tuple[int, str]:
        kind = file.stem.partition("-")[0]
        return (order.index(kind) if kind in order else len(order), file.name)

    return [Picture(file) for file in sorted(files.values(), key=place)]


def evaluation(folder: Path) -> list[Table]:
    """The tables of task=evaluate, of the checkpoint that was evaluated last."""
    file = folder / "evaluate" / "summary.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    latest = found.get("checkpoints", {}).get(found.get("checkpoint"), found)
    results = latest.get("results", latest)
    if not all(isinstance(result, dict) and {"about", "rows"} <= result.keys() for result in results.values()):
        return list(tables(results))  # of another version
    grids = {result["about"]: grid(protocol, result["rows"]) for protocol, result in results.items()}
    return [Table(about, heads, rows) for about, (heads, *rows) in grids.items()]


def cost(summary: Record) -> list[tuple[str, str]]:
    """What the run took, as rows of what there is."""
    forms = {
        "steps": ("optimizer steps", "{:,.0f}"),
        "epochs": ("epochs", "{:.3g}"),
        "seconds": ("seconds of training", "{:,.0f}"),
        "watch_seconds": ("seconds of probes and collapse watch", "{:,.0f}"),
        "images_per_second": ("images per second", "{:,.0f}"),
        "peak_memory_mb": ("peak memory", "{:,.0f} MB"),
        "device": ("device", "{}"),
    }
    rows = [(name, form.format(summary[key])) for key, (name, form) in forms.items() if summary.get(key) is not None]
    parameters = summary.get("parameters", {})
    return [*rows, *((f"parameters, {part}", f"{count:,}") for part, count in parameters.items())]


def choice(group: str, node: Config) -> tuple[str, str, str]:
    """A group, the class that was chosen there, and its plain options."""
    kind = node.get("_target_", "none").rpartition(".")[2]
    options = [f"{key}={value}" for key, value in flatten(node).items() if not key.startswith("_") and "._" not in key]
    return group, kind, "  ".join(options)
