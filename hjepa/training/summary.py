"""The end of a run: the contents of summary.json, and a few plain sentences for the terminal."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from hjepa.config.run import COMMAND
from hjepa.config.schema import Config
from hjepa.tracking.provenance import git_state
from hjepa.training.monitor import Monitor
from hjepa.training.trainer import Trainer

PROBES = {"linear": "linear probe", "knn": "k-NN"}


def build_summary(
    config: Config, trainer: Trainer, monitor: Monitor, records: list[dict[str, Any]], run_id: str | None
) -> dict[str, Any]:
    """Return the contents of summary.json.

    Accuracies are fractions, and `best` is the record with the highest accuracy of the linear probe. `untrained` are the scores
    of the network with random weights, and `initial` those of the weights that the run started from, if these were given.
    """
    hardware, probed = trainer.components.hardware, [r for r in records if "probe/linear" in r]
    best = max(probed, key=lambda r: r["probe/linear"], default={})
    return {
        "probe": monitor.latest_scores,
        "best": {k.removeprefix("probe/"): v for k, v in best.items() if k.startswith("probe/") or k == "step"},
        "untrained": monitor.untrained_scores,
        "initial": monitor.initial_scores,
        "images_per_second": trainer.plan.images_seen(trainer.completed_steps) / max(trainer.seconds, 1e-9),
        "steps": trainer.completed_steps,
        "epochs": trainer.plan.epochs_done(trainer.completed_steps),
        "seconds": trainer.seconds,
        "watch_seconds": monitor.seconds,
        "peak_memory_mb": hardware.peak_memory_mb(),
        "parameters": trainer.model.parameter_counts(),
        "device": hardware.describe(),
        "seed": config["seed"],
        "run_id": run_id,
        "commit": git_state().get("commit"),
        "dirty": git_state().get("dirty"),
        "command": os.environ.get(COMMAND),
    }


class Gain(NamedTuple):
    """The accuracy of a probe beside its baselines.

    Attributes:
        probe: Name of the probe.
        score: Accuracy of the run.
        untrained: Accuracy of the network with random weights; None if it is not known.
        initial: Accuracy of the weights that the run started from; None if these were random.
    """

    probe: str
    score: float
    untrained: float | None
    initial: float | None

    @property
    def baseline(self) -> float:
        """The accuracy before training."""
        return (self.untrained or 0.0) if self.initial is None else self.initial

    @property
    def baseline_name(self) -> str:
        """What the baseline is."""
        return "untrained network" if self.initial is None else "the weights it started from"

    @property
    def random(self) -> float | None:
        """The accuracy of the network with random weights where it is not the baseline."""
        return None if self.initial is None else self.untrained

    @property
    def words(self) -> str:
        """The difference from the baseline in words."""
        points = round(100 * (self.score - self.baseline), 1)
        return f"{abs(points):.1f} points {'better' if points > 0 else 'WORSE'}" if points else "no better"


def gains(summary: dict[str, Any]) -> list[Gain]:
    """Return the gain of every probe in a summary; probes of labels other than the main one carry the label's name."""
    result = []
    untrained, initial = summary.get("untrained", {}), summary.get("initial", {})
    for key, score in summary.get("probe", {}).items():
        kind, _, label = key.partition("_")
        if kind in PROBES and (key in untrained or key in initial):
            probe = PROBES[kind] + (f" ({label})" if label else "")
            result.append(Gain(probe, score, untrained.get(key), initial.get(key)))
    return result


def print_summary(summary: dict[str, Any], folder: Path, view_command: str | None) -> None:
    """Print the result in words; the last line names the run folder."""
    if summary["status"] == "collapsed":
        print(f"The run COLLAPSED: {summary['reason']}.")
    for gain in gains(summary):
        random = "" if gain.random is None else f"; a network with random weights {gain.random:6.1%}"
        print(
            f"{gain.probe:>20}: {gain.score:6.1%} of the validation images right, "
            f"{gain.baseline_name} {gain.baseline:6.1%}: {gain.words}{random}"
        )
    print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, {summary['images_per_second']:.0f} images/s, "
        f"peak memory {summary['peak_memory_mb']:.0f} MB; probes and other measurements took {summary['watch_seconds']:.0f} s"
    )
    if view_command:
        print(f"To view the run, type\n  {view_command}")
    print(f"Run folder: {folder}")
