"""One job of a sweep: its overrides, its run folder, and its state."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hjepa.config.run_path import run_path
from hjepa.config.schema import Config


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        number: Position in the sweep, from 0.
        overrides: Overrides of the command line that are specific to this job.
        folder: Folder of its run; None if its config is invalid or its task makes no run.
        log: File with its output; None if it was never started.
        state: pending, running, finished, collapsed, stopped, FAILED, missing (see `Sweep.load`), or a state of the SLURM queue.
        reason: Why it failed or stopped.
        slurm_id: Its id in SLURM.
        config: The resolved and checked config; empty for an invalid config and for jobs read from a sweep folder.
        composed: The same config as composed by Hydra, including the `hydra` node.
        summary: Contents of summary.json in the run folder.
    """

    number: int
    overrides: list[str]
    folder: Path | None
    log: Path | None = None
    state: str = "pending"
    reason: str = ""
    slurm_id: str = ""
    config: Config = field(default_factory=dict, repr=False)
    composed: DictConfig = field(default_factory=lambda: DictConfig({}), repr=False)
    summary: dict[str, Any] = field(default_factory=dict, repr=False)

    def update_from_summary(self, summary: dict[str, Any]) -> None:
        """Set summary, state and reason from the summary of the run folder."""
        self.summary = summary
        self.state = {"failed": "FAILED"}.get(summary["status"], summary["status"])
        self.reason = summary.get("reason") or ""

    @property
    def path(self) -> Path:
        """The folder that its config names."""
        return self.folder or run_path(self.config)

    @property
    def is_complete(self) -> bool:
        """Whether the run reached its end, so that its results count."""
        return self.state in ("finished", "collapsed")

    @property
    def is_done(self) -> bool:
        """Whether nothing remains to be run."""
        return self.state in ("finished", "collapsed", "stopped", "FAILED", "missing")
