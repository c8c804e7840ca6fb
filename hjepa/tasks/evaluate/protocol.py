"""What a protocol is given, and what it returns: a table's rows (sources of features) and columns (scores)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor
from tqdm import tqdm

from hjepa.config.errors import UserError
from hjepa.config.identity import short_hash
from hjepa.config.instantiate import build_or_none
from hjepa.config.schema import Config
from hjepa.metrics.probes import Probe
from hjepa.tasks.evaluate.features import Data, Features
from hjepa.tasks.trained_run import TrainedRun, load_run

# source -> column -> number; sources are trained/block 3, untrained/stacked 1, pixels, ...; a column "X std" is the spread of X
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvalContext:
    """A run and the data that its features are judged on.

    Attributes:
        probe: the run's own, for options that are left open.
    """

    run: TrainedRun
    data: Data
    features: Features
    probe: Probe

    def key(self, options: Config) -> str:
        """Digits of everything that a protocol's result is a function of."""
        return short_hash(self.features.key | {"options": options, "probe": asdict(self.probe)})

    def labels(self) -> list[tuple[str, Tensor, Tensor]]:
        """Every label: its name, and the labels to fit on [N] and to score on [M], in the order of the features."""
        train, test = (self.data.parts[role].labels for role in ("train", "test"))
        return [(name, train[name], test[name]) for name in train]

    def pairs(self, what: str, last_only: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        """`Features.pairs`, with progress."""
        total = self.features.count(last_only)
        return iter(tqdm(self.features.pairs(last_only), total=total, desc=what, unit="row", disable=None))


class EvalProtocol(Protocol):
    """A protocol of evaluation."""

    def check(self, study: EvalContext) -> None:
        """Raise UserError for a run or data that it cannot judge, before long work starts."""

    def about(self, study: EvalContext) -> str:
        """What is scored, and what on, in words."""

    def __call__(self, study: EvalContext) -> Scores:
        """The scores of every source; accuracies are fractions."""


@dataclass(frozen=True)
class EvalOptions:
    """The shared options of an evaluation, see `hjepa.tasks.evaluate.evaluate.evaluate`."""

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

    def study(self, config: Config, folder: Path, place: Path) -> EvalContext:
        """Open a run.

        Args:
            config: of the command; folder: of the run; place: where features are kept.
        """
        run = load_run(config | {"run": str(folder)}, self.checkpoint, self.root)
        probe: Probe | None = build_or_none(run.config["probe"]) or build_or_none(config["probe"])
        if probe is None:
            raise UserError(f"{folder} was trained without probes and none is chosen now; leave probe=none out.")
        data = Data(run.dataset, run.config["dataset"], self.split, self.train_images, self.test_images)
        return EvalContext(run, data, Features(run, data, place, self.blocks(run), self.batch_size or probe.batch_size), probe)

    def blocks(self, run: TrainedRun) -> list[int]:
        """The depths to judge, ascending; the last block is always among them."""
        last, depths = run.encoder.depth, self.depths
        if depths is not None and (not depths or not all(1 <= depth <= last for depth in depths)):
            raise UserError(
                f"task.depths={depths}: {run.folder.name} has an encoder of {last} blocks; expected some of 1 to {last}."
            )
        return sorted({*(depths or range(1, last + 1)), last})
