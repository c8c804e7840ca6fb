"""What of a run is judged, and on which images: the options that all protocols share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hjepa.config import Config, build_or_none
from hjepa.errors import UserError
from hjepa.evaluate.features import Data, Features
from hjepa.evaluate.study import Study
from hjepa.opened import Opened, open_run
from hjepa.probes import Probe


@dataclass(frozen=True)
class Scope:
    """The shared options of an evaluation, see `hjepa.evaluate.evaluate.evaluate`."""

    checkpoint: str | None
    root: str | None
    split: Literal["test", "validation"]
    train_images: int | None
    test_images: int | None
    batch_size: int | None
    depths: list[int] | None

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"task.{name}={value}: expected at least 1, or null.")

    def study(self, config: Config, folder: Path, place: Path) -> Study:
        """Open a run.

        Args:
            config: of the command; folder: of the run; place: where features are kept.
        """
        run = open_run(config | {"run": str(folder)}, self.checkpoint, self.root)
        probe: Probe | None = build_or_none(run.config["probe"]) or build_or_none(config["probe"])
        if probe is None:
            raise UserError(f"{folder} was trained without probes and none is chosen now; leave probe=none out.")
        data = Data(run.dataset, run.config["dataset"], self.split, self.train_images, self.test_images)
        return Study(run, data, Features(run, data, place, self.blocks(run), self.batch_size or probe.batch_size), probe)

    def blocks(self, run: Opened) -> list[int]:
        """The depths to judge, ascending; the last block is always among them."""
        last, depths = run.encoder.depth, self.depths
        if depths is not None and (not depths or not all(1 <= depth <= last for depth in depths)):
            raise UserError(
                f"task.depths={depths}: {run.folder.name} has an encoder of {last} blocks; expected some of 1 to {last}."
            )
        return sorted({*(depths or range(1, last + 1)), last})
