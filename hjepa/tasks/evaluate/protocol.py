"""The interface of evaluation protocols: their input, a run with its data and features, and their output, a table of scores."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.identity import short_hash
from hjepa.config.instantiate import build_or_none
from hjepa.config.schema import Config
from hjepa.config.terminal import progress_bar
from hjepa.metrics.probes import Probe
from hjepa.tasks.evaluate.features import EvalData, Features
from hjepa.tasks.trained_run import TrainedRun, load_run

# source of features -> column -> score. Sources are trained/block 3, initial/block 3, untrained/stacked 1, pixels, ...; a column
# "X std" is the standard deviation of the column X.
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvalContext:
    """The input of a protocol.

    Attributes:
        run: Run to evaluate.
        data: Images to fit to and images to score on.
        features: Features of these images.
        probe: Probe of the run, which supplies the options that a protocol leaves open.
        options: Config of the protocol.
    """

    run: TrainedRun
    data: EvalData
    features: Features
    probe: Probe
    options: Config

    @property
    def key(self) -> str:
        """Hash of the features, the options of the protocol and the probe."""
        return short_hash(self.features.key | {"options": self.options, "probe": asdict(self.probe)})

    def labels(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return the name of every label, its values to fit to [N] and to score on [M]; see `EvalData.labels`."""
        return self.data.labels

    def sources(self, protocol: str, last_only: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield `Features.sources` with a progress bar."""
        total = self.features.num_sources(last_only)
        yield from progress_bar(self.features.sources(last_only), total=total, desc=f"scoring {protocol}", unit="source")


class EvalProtocol(ABC):
    """A protocol: a dataclass with the options of its file in `conf/protocol/`."""

    percent = True  # scores are fractions, which tables show in percent

    def check(self, context: EvalContext) -> None:
        """Raise `UserError` for data that cannot be evaluated, and `NotApplicable` if only this protocol cannot evaluate it.

        This is called before any long computation. Without an implementation of its own, a protocol needs labels.
        """
        context.labels()

    def key(self, context: EvalContext) -> str:
        """Return a hash of everything that determines the scores."""
        return context.key

    @abstractmethod
    def describe(self, context: EvalContext) -> str:
        """Return the title of the table: what is scored, on which images."""

    @abstractmethod
    def score(self, context: EvalContext) -> Scores:
        """Return the scores of every source of features."""


@dataclass(frozen=True)
class EvalOptions:
    """The options that all protocols share; see `hjepa.tasks.evaluate.evaluate.evaluate_runs`."""

    checkpoint: str | None
    root: str | None
    split: Literal["test", "validation"]
    train_images: int | None
    test_images: int | None
    batch_size: int | None
    depths: list[int] | None

    def load_context(self, config: Config, folder: Path, features_folder: Path) -> EvalContext:
        """Load a run and return the context of its evaluation, with empty `options`.

        Args:
            config: Config of the command.
            folder: Folder of the run.
            features_folder: Folder to store features in.
        """
        run = load_run(config | {"run": str(folder)}, self.checkpoint, self.root)
        probe: Probe | None = build_or_none(run.config["probe"]) or build_or_none(config["probe"])
        if probe is None:
            raise UserError(f"{folder} was trained without probes, and this command has none either; leave out probe=none.")
        data = EvalData(run.dataset, run.config["dataset"], self.split, self.train_images, self.test_images)
        features = Features(run, data, features_folder, self.depths_of(run), self.batch_size or probe.batch_size)
        return EvalContext(run, data, features, probe, options={})

    def depths_of(self, run: TrainedRun) -> list[int]:
        """Return the layers of the encoder to evaluate in ascending order; the last one is always among them."""
        last, depths = run.encoder.num_layers, self.depths
        if depths is not None and (not depths or not all(1 <= depth <= last for depth in depths)):
            raise UserError(
                f"task.depths={depths}: the encoder of {run.folder.name} has {last} {run.encoder.layer_name}s; expected numbers "
                f"from 1 to {last}."
            )
        return sorted({*(depths or range(1, last + 1)), last})
