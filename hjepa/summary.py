"""The end of a run: summary.json for machines, a few plain sentences for people."""

from pathlib import Path
from typing import Any

from hjepa.code import git_state
from hjepa.config import Config
from hjepa.trainer import Parts, Trainer
from hjepa.watch import Watch

PROBES = {"linear": "linear probe", "knn": "k-NN"}


def summarise(
    config: Config, parts: Parts, trainer: Trainer, watch: Watch, records: list[dict[str, Any]], run_id: str | None
) -> dict[str, Any]:
    """The contents of summary.json; accuracies are fractions, `best` is the probe record of the highest linear accuracy."""
    probes = [r for r in records if "probe/linear" in r]
    best = max(probes, key=lambda r: r["probe/linear"], default={})
    return {
        "probe": watch.latest,
        "best": {k.removeprefix("probe/"): v for k, v in best.items() if k.startswith("probe/") or k == "step"},
        "untrained": watch.untrained,
        "images_per_second": trainer.plan.seen(trainer.done) / max(trainer.seconds, 1e-9),
        "steps": trainer.done,
        "epochs": trainer.plan.passed(trainer.done),
        "seconds": trainer.seconds,
        "watch_seconds": watch.seconds,
        "peak_memory_mb": parts.hardware.peak_memory_mb(),
        "parameters": parts.model.parameter_counts(),
        "device": parts.hardware.describe(),
        "seed": config["seed"],
        "run_id": run_id,
        "commit": git_state().get("commit"),
        "dirty": git_state().get("dirty"),
    }


def tell(summary: dict[str, Any], folder: Path, how_to_look: str | None) -> None:
    """Print what came out in words; the last line names the run folder."""
    if summary["status"] == "collapsed":
        print(f"The run COLLAPSED: {summary['reason']}.")
    now, before = summary["probe"], summary["untrained"]
    for key, score in now.items():
        kind, _, label = key.partition("_")
        if kind in PROBES:
            gain = 100 * (score - before[key])
            print(
                f"{PROBES[kind] + (f' ({label})' if label else ''):>20}: {score:6.1%} of the validation images right, "
                f"untrained network {before[key]:6.1%}: {abs(gain):.1f} points {'better' if gain >= 0 else 'WORSE'}"
            )
    print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['images_per_second']:.0f} images/s, "
        f"peak memory {summary['peak_memory_mb']:.0f} MB; probes and collapse watch took {summary['watch_seconds']:.0f} s"
    )
    if how_to_look:
        print(f"To look at it in MLflow, type\n  {how_to_look}")
    print(f"Run folder: {folder}")
