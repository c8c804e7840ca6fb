"""Checkpoints: everything that a run needs to continue bit for bit, written so that a crash never leaves a damaged file.

`latest.pt` is the state from which a run resumes. `best.pt` (and further `best-*.pt`) are the states with the highest probe
scores, and `epoch-N.pt` are kept on request. `initial.pt` is the state before the first step of a run that starts from given
weights, the baseline of its evaluations. Every checkpoint holds the state of the trainer (step, model, optimizer, ...), the
state of the monitor under `watch`, and the part of the config that identifies the run under `identity`. Random states are not
stored, because all randomness derives from the seed and the step.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from hjepa.config.errors import UserError
from hjepa.config.extension import without_length
from hjepa.config.identity import differences, starts_from_weights
from hjepa.config.types import NonNegativeInt, PositiveFloat, PositiveInt
from hjepa.config.upgrade import upgrade_config
from hjepa.distributed.process_group import World
from hjepa.models.pretrained import read_checkpoint
from hjepa.tracking.atomic import atomic_files

State = dict[str, Any]


class Checkpointer:
    """Saves and loads the checkpoints of a run.

    Args:
        every_seconds: Training time between two saves, which is the most that a crash can cost; each epoch end is saved as well.
        every_epochs: Keep `epoch-N.pt` of every n-th epoch; None keeps none.
        last: Number of last epochs whose `epoch-N.pt` is kept.
        best: Number of checkpoints with the highest probe scores to keep.
    """

    def __init__(
        self, every_seconds: PositiveFloat, every_epochs: PositiveInt | None, last: NonNegativeInt, best: NonNegativeInt
    ) -> None:
        self.every_seconds, self.every_epochs, self.last, self.best = every_seconds, every_epochs, last, best
        self.folder, self.identity, self.world = Path(), State(), World()
        self.saved_at = time.monotonic()

    def attach(self, folder: Path, identity: State, world: World) -> None:
        """Set the folder of the checkpoints, the identity of the run (see `hjepa.config.identity`) and its processes."""
        self.folder, self.identity, self.world = folder, identity, world

    @property
    def latest(self) -> Path:
        """The checkpoint from which a run resumes."""
        return self.folder / "latest.pt"

    def clean(self) -> None:
        """Create the folder, or remove what an interrupted write has left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()

    def due(self) -> bool:
        """Return whether `every_seconds` have passed since the last save."""
        return time.monotonic() - self.saved_at > self.every_seconds

    def save(self, trainer: Stateful, monitor: Stateful, epoch: int | None = None, score: float | None = None) -> None:
        """Save the latest state; every process must call this, and the main process writes.

        Args:
            trainer: Trainer whose state is saved.
            monitor: Monitor whose state is saved.
            epoch: Number of the epoch that has just ended, if any, to keep its checkpoint as configured.
            score: Probe score of this state, if any, to keep it among the best.
        """
        state = {"identity": self.identity, **trainer.state_dict(), "watch": monitor.state_dict()}
        if self.world.main:
            self.write(state, epoch, score)
        self.saved_at = time.monotonic()

    def write(self, state: State, epoch: int | None, score: float | None) -> None:
        """Write the latest state and keep it under further names as configured; see `save`.

        The latest state gets its own name last: a run that is killed before resumes from the one before and does all of it again.
        """
        with atomic_files(self.latest) as (temporary,):
            with temporary.open("wb") as file:  # torch reports a full disk without its error number if it opens the file
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if state["step"] == 0 and starts_from_weights(self.identity):
                self.keep_as("initial.pt", temporary)
            if epoch is not None and (self.last or self.every_epochs):
                self.keep_as(f"epoch-{epoch:05d}.pt", temporary)
                self.prune_epochs(epoch)
            if score is not None and self.best:
                self.keep_if_best(score, int(state["step"]), temporary)

    def load(self, trainer: Stateful, monitor: Stateful, device: torch.device) -> State | None:
        """Load the latest state into trainer and monitor; every process must call this.

        Args:
            trainer: Trainer to restore.
            monitor: Monitor to restore.
            device: Device to which the tensors are loaded.

        Returns:
            The identity of the run when the checkpoint was saved, which may have been shorter; None without a checkpoint.

        Raises:
            UserError: The checkpoint belongs to a run with another config.
        """
        if not self.world.broadcast_object(self.latest.exists()):  # the main process has prepared the folder, and decides for all
            return None
        state = read_checkpoint(self.latest, device)
        saved = upgrade_config(state["identity"])
        changed = differences(without_length(saved), without_length(self.identity))  # the run folder has checked the length
        if changed:
            raise UserError(f"{self.latest} belongs to another config ({'; '.join(changed)}); remove it or set another name.")
        trainer.load_state_dict(state)
        monitor.load_state_dict(state["watch"])
        return saved

    def keep_as(self, name: str, file: Path) -> None:
        """Keep a checkpoint under another name: as a hard link, or as a copy on file systems without hard links."""
        with atomic_files(self.folder / name) as (temporary,):
            try:
                os.link(file, temporary)
            except OSError:
                shutil.copyfile(file, temporary)

    def prune_epochs(self, epoch: int) -> None:
        """Remove the checkpoints of epochs that are neither among the last `last` nor a multiple of `every_epochs`."""
        for path in self.folder.glob("epoch-*.pt"):
            number = int(path.stem.removeprefix("epoch-"))
            if number <= epoch - self.last and not (self.every_epochs and number % self.every_epochs == 0):
                path.unlink()

    def keep_if_best(self, score: float, step: int, file: Path) -> None:
        """Keep a checkpoint if its score is among the `best` highest; `best.pt` has the highest score."""
        for repeated in self.folder.glob(f"best-*-{step:08d}.pt"):  # of a session that was killed right after it
            repeated.unlink()
        self.keep_as(f"best-{score:.4f}-{step:08d}.pt", file)
        ranked = sorted(self.folder.glob("best-*.pt"), key=best_rank, reverse=True)
        for path in ranked[self.best :]:
            path.unlink()
        if best_rank(ranked[0])[1] == -step:
            self.keep_as("best.pt", file)


def best_rank(path: Path) -> tuple[float, int]:
    """Return (score, -step) of a file `best-SCORE-STEP.pt`: a higher score ranks first, and the earlier step wins a tie."""
    _, score, step = path.stem.split("-")
    return float(score), -int(step)
