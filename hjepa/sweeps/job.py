"""One job of a sweep: what it was asked for, where it is, and how it is getting on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hjepa.config.schema import Config


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        folder: of its run, None if its config names none; log: where what it said is, None if it was never started.
        state: pending, running, finished, collapsed, stopped or FAILED, or what a queue says of it; reason: in one line.
        config: resolved and checked; empty for a FAILED config and for jobs read from a sweep folder.
        composed: the same with Hydra's own part, as Hydra made it.
        summary: of its run folder.
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
        """Take state and results from the summary of its run folder."""
        self.summary = summary
        self.state = {"failed": "FAILED"}.get(summary["status"], summary["status"])
        self.reason = summary.get("reason") or ""

    @property
    def is_complete(self) -> bool:
        """Whether its run came to its end, so that its results count."""
        return self.state in ("finished", "collapsed")

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state in ("finished", "collapsed", "stopped", "FAILED")
