"""What a protocol is given, and what it returns: a table's rows (sources of features) and columns (scores)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor
from tqdm import tqdm

from hjepa.config import Config, digits
from hjepa.evaluate.features import Data, Features
from hjepa.opened import Opened
from hjepa.probes import Probe

# source -> column -> number; sources are trained/block 3, untrained/stacked 1, pixels, ...; a column "X std" is the spread of X
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Study:
    """A run and the data that its features are judged on.

    Attributes:
        probe: the run's own, for options that are left open.
    """

    run: Opened
    data: Data
    features: Features
    probe: Probe

    def key(self, options: Config) -> str:
        """Digits of everything that a protocol's result is a function of."""
        return digits(self.features.key | {"options": options, "probe": asdict(self.probe)})

    def labels(self) -> list[tuple[str, Tensor, Tensor]]:
        """Every label: its name, and the labels to fit on [N] and to score on [M], in the order of the features."""
        train, test = (self.data.parts[role].labels for role in ("train", "test"))
        return [(name, train[name], test[name]) for name in train]

    def pairs(self, what: str, last_only: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        """`Features.pairs`, with progress."""
        total = self.features.count(last_only)
        return iter(tqdm(self.features.pairs(last_only), total=total, desc=what, unit="row", disable=None))


class Judge(Protocol):
    """A protocol of evaluation."""

    def refuse(self, study: Study) -> None:
        """Raise UserError for a run or data that it cannot judge, before long work starts."""

    def about(self, study: Study) -> str:
        """What is scored, and what on, in words."""

    def __call__(self, study: Study) -> Rows:
        """The scores of every source; accuracies are fractions."""
