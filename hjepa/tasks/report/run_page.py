"""The facts that the report on a run shows, read from the run folder."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.identity import flatten, is_benchmark
from hjepa.config.passwords import hide_passwords
from hjepa.config.schema import Config
from hjepa.plotting import CAPTIONS
from hjepa.tasks.evaluate.tables import result_table
from hjepa.tasks.report.html import Picture, Table
from hjepa.tasks.visualize.summary import picture_steps
from hjepa.tracking.run_folder import Record, read_config, read_records, read_summary
from hjepa.training.summary import gains

GROUPS = (
    *("model", "levels", "masking", "loss", "regularizer", "projector"),
    *("teacher", "optimizer", "schedule", "dataset", "train"),
)

STATUS_TEXT = {
    "stopped": "was stopped",
    "requeued": "was stopped and waits in the queue to continue",
    "failed": "FAILED",
    "collapsed": "COLLAPSED",
}

COSTS = {  # key of summary.json -> label and format
    "steps": ("optimizer steps", "{:,.0f}"),
    "epochs": ("epochs", "{:.3g}"),
    "seconds": ("seconds of training", "{:,.0f}"),
    "watch_seconds": ("seconds of probes and collapse statistics", "{:,.0f}"),
    "images_per_second": ("images per second", "{:,.0f}"),
    "peak_memory_mb": ("peak memory", "{:,.0f} MB"),
    "device": ("device", "{}"),
}

CURVES = "curves.png"

OF_ALL_STEPS = (CURVES, "masks.png")  # pictures that show no network of a certain step


def run_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a run's page; the run may be unfinished, failed, or without probes."""
    config, summary, records = read_config(folder), read_summary(folder), read_records(folder)
    last = last_step(summary, records)
    pictures = find_pictures(folder, last)
    absent = {picture.name for picture in pictures} | set(read_summary(folder / "visualize").get("skipped", []))
    check_complete(folder, config)
    return {
        "title": f"{config['experiment_name']} / {folder.name}",
        "folder": str(folder),
        "status": describe_status(summary, records),
        "gains": gains(summary),
        "is_probed": bool(config.get("probe")),
        "is_benchmark": is_benchmark(config),
        "held_out": held_out_losses(records),
        "curves": [picture for picture in pictures if picture.name == "curves"],
        "pictures": [picture for picture in pictures if picture.name != "curves"],
        "missing": [name for name in CAPTIONS if name not in absent and name not in impossible_pictures(config)],
        "evaluation": evaluation_tables(folder, last),
        "costs": cost_rows(summary),
        "groups": [group_row(group, config[group]) for group in GROUPS if group in config],
        "config": OmegaConf.to_yaml(OmegaConf.create(hide_passwords(config))),
        "provenance": {key: hide_passwords(summary.get(key)) for key in ("command", "commit", "dirty")},
        "seed": config["seed"],
    }


def check_complete(folder: Path, config: Config) -> None:
    """Raise `UserError` for a config that was not written by this package."""
    if missing := [key for key in ("experiment_name", "seed", "task", "levels", "masking") if key not in config]:
        raise UserError(f"{folder}/config.yaml has no {missing[0]}, which every run has; choose the folder of a run.")


def impossible_pictures(config: Config) -> set[str]:
    """Return the pictures of predictions that the run cannot have, because its targets are not hidden, or not in other views."""
    levels, hidden = config["levels"], config["masking"]["_target_"] != "hjepa.masking.NoMasking"
    views = set(levels["view"]) if levels["stage"] else set()
    possible = {"masks": hidden, "predictions": "same" in views, "views": "other" in views}
    return {name for name, is_possible in possible.items() if not is_possible}


def describe_status(summary: Record, records: list[Record]) -> str:
    """Return a sentence about a run that has not finished; empty for a finished run."""
    if not summary:
        return f"This run has not ended; it has reached step {last_step(summary, records)} so far."
    if summary["status"] == "finished":
        return ""
    reason = f": {summary['reason']}" if summary.get("reason") else ""
    return f"This run {STATUS_TEXT.get(summary['status'], summary['status'])}{reason}."


def held_out_losses(records: list[Record]) -> dict[str, float] | None:
    """Return the last held-out loss and that of predicting one constant vector; None if the run predicts nothing."""
    last = next((record for record in reversed(records) if "validation/loss" in record), None)
    return last and {"loss": last["validation/loss"], "constant": last["validation/constant_loss"]}


def last_step(summary: Record, records: list[Record]) -> int:
    """Return the step that a run has reached."""
    return int(summary.get("steps") or (records[-1]["step"] if records else 0))


def find_pictures(folder: Path, last: int) -> list[Picture]:
    """Return the pictures of a run in the order of `CAPTIONS`; those of task=visualize replace those of training.

    Of the curves, which both draw, the newer ones are taken.

    Args:
        folder: Run folder.
        last: Step that the run has reached; pictures of another step say so.
    """
    trained, drawn = ({file.name: file for file in (folder / name).glob("*.png")} for name in ("plots", "visualize"))
    if CURVES in trained and CURVES in drawn:
        drawn[CURVES] = max(drawn[CURVES], trained[CURVES], key=lambda file: file.stat().st_mtime_ns)
    steps = picture_steps(folder / "visualize")
    files = (trained | drawn).values()
    pictures = [Picture(file, picture_note(file, steps, last)) for file in files]
    order = list(CAPTIONS)
    return sorted(pictures, key=lambda p: (order.index(p.name) if p.name in order else len(order), p.file.name))


def picture_note(file: Path, steps: dict[str, int], last: int) -> str:
    """Return a sentence about the step of a picture that shows a network of another step than the last; empty for others."""
    step = steps.get(file.name) if file.parent.name == "visualize" and file.name not in OF_ALL_STEPS else None
    return "" if step in (None, last) else f"The network of step {step} of {last}."


def evaluation_tables(folder: Path, last: int) -> list[Table]:
    """Return a table per protocol of task=evaluate, for the checkpoint that was evaluated last; none before an evaluation.

    Args:
        folder: Run folder.
        last: Step that the run has reached; the titles of results of another step say so.
    """
    evaluation = read_summary(folder / "evaluate")
    checkpoint = evaluation.get("checkpoints", {}).get(evaluation.get("checkpoint"), {})
    note = "" if checkpoint.get("step") in (None, last) else f"; the network of step {checkpoint['step']} of {last}"
    results = checkpoint.get("results", {})
    return [Table.from_frame(f"{result['about']}{note}", result_table(name, result)) for name, result in results.items()]


def cost_rows(summary: Record) -> list[tuple[str, str]]:
    """Return label and value of every cost that the summary contains."""
    rows = [(label, form.format(summary[key])) for key, (label, form) in COSTS.items() if summary.get(key) is not None]
    return [*rows, *((f"parameters, {module}", f"{count:,}") for module, count in summary.get("parameters", {}).items())]


def group_row(group: str, node: Config) -> tuple[str, str, str]:
    """Return a config group, the class that was chosen for it, and its plain options."""
    class_name = node.get("_target_", "none").rpartition(".")[2]
    options = [f"{key}={value}" for key, value in flatten(node).items() if not key.startswith("_") and "._" not in key]
    return group, class_name, "  ".join(options)
