"""Checkpoints: everything that a run needs to go on bit for bit, written so that no crash leaves a torn file.

`latest.pt` is the state to resume from, `best.pt` (and further best ones) the state with the highest probe score, and
`epoch-N.pt` are kept on request. Random states are not stored: all randomness derives from the seed and the step.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch

from hjepa.config.errors import UserError
from hjepa.config.identity import differences
from hjepa.config.upgrade import upgrade_config
from hjepa.models.pretrained import read

State = dict[str, Any]


def save_atomically(path: Path, state: State) -> None:
    """Write beside the target, flush to the disk, then rename: the target is always the old or the new file, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk has room again for the reason to be written down
        raise


class Checkpointer:
    """The checkpoint folder of a run.

    Args:
        every_seconds: the most training time that a crash may cost; the end of an epoch is always saved.
        every_epochs: keep `epoch-N.pt` of every n-th epoch; None keeps none.
        last: keep `epoch-N.pt` of the last k epochs.
        best: keep the best n by probe score.
    """

    def __init__(self, every_seconds: float, every_epochs: int | None, last: int, best: int) -> None:
        if every_seconds <= 0 or last < 0 or best < 0 or (every_epochs is not None and every_epochs < 1):
            raise UserError(
                f"checkpoint.every_seconds={every_seconds}, every_epochs={every_epochs}, last={last}, best={best}: "
                "expected a positive interval, every_epochs of at least 1 or null, and counts of at least 0."
            )
        self.every_seconds, self.every_epochs, self.last, self.best = every_seconds, every_epochs, last, best
        self.folder, self.identity = Path(), State()
        self.saved_at = time.monotonic()

    def open(self, folder: Path, identity: State) -> None:
        """Use a folder for the run of a config."""
        self.folder, self.identity = folder, identity

    def clean(self, folder: Path) -> None:
        """Make the folder, or remove what an interrupted write has left in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()

    def load(self, device: torch.device) -> State | None:
        """The latest state, None if there is none yet; refuses one of another config."""
        if not self.latest.exists():
            return None
        state = read(self.latest, device)
        changed = differences(upgrade_config(state["identity"]), self.identity)
        if changed:
            raise UserError(f"{self.latest} belongs to another config ({'; '.join(changed)}); remove it or give another name.")
        return state

    @property
    def latest(self) -> Path:
        """The state to resume from."""
        return self.folder / "latest.pt"

    def due(self) -> bool:
        """Whether `every_seconds` have passed since the last save."""
        return time.monotonic() - self.saved_at > self.every_seconds

    def save(self, state: State, epoch: int | None = None, score: float | None = None) -> None:
        """Save the latest state; at the end of an epoch also what is kept of it."""
        save_atomically(self.latest, {"identity": self.identity, **state})
        self.saved_at = time.monotonic()
        if epoch is not None and (self.last or self.every_epochs):
            self.keep(f"epoch-{epoch:05d}.pt")
            self.prune_epochs(epoch)
        if score is not None and self.best:
            self.keep_best(score, int(state["step"]))

    def keep(self, name: str) -> None:
        """Give the latest state a second name; a hard link costs neither time nor space."""
        link = self.folder / f".{name}.tmp"
        link.unlink(missing_ok=True)
        os.link(self.latest, link)
        link.replace(self.folder / name)

    def prune_epochs(self, epoch: int) -> None:
        """Remove the epochs that are neither among the last k nor a multiple of n."""
        for path in self.folder.glob("epoch-*.pt"):
            number = int(path.stem.removeprefix("epoch-"))
            if number <= epoch - self.last and not (self.every_epochs and number % self.every_epochs == 0):
                path.unlink()

    def keep_best(self, score: float, step: int) -> None:
        """Keep this state if its score is among the n best; `best.pt` is the very best."""
        self.keep(f"best-{score:.4f}-{step:08d}.pt")
        ranked = sorted(self.folder.glob("best-*.pt"), key=best_rank, reverse=True)
        for path in ranked[self.best :]:
            path.unlink()
        if best_rank(ranked[0])[1] == -step:
            self.keep("best.pt")


def best_rank(path: Path) -> tuple[float, int]:
    """(score, -step) from a name `best-SCORE-STEP.pt`: higher is better, earlier wins a tie."""
    _, score, step = path.stem.split("-")
    return float(score), -int(step)
