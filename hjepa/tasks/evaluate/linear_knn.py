"""Linear and k-NN accuracy of every source of features: the probe of the training loop, applied to all layers."""

from dataclasses import dataclass, replace

from hjepa.config.errors import UserError
from hjepa.config.types import PositiveFloat, PositiveInt
from hjepa.metrics.probes import accuracy, knn
from hjepa.tasks.evaluate.protocol import EvalContext, EvalProtocol, Scores


@dataclass(frozen=True)
class LinearProbe(EvalProtocol):
    """Logistic regression.

    Args:
        penalties: L2 penalties, of which the one with the best accuracy on a fifth of the images to fit to is chosen; None for
            the penalties of the run's own probe.
    """

    penalties: list[PositiveFloat] | None

    def __post_init__(self) -> None:
        if self.penalties is not None and not self.penalties:
            raise UserError("protocol.linear.penalties=[]: expected at least one penalty, or null.")

    def describe(self, context: EvalContext) -> str:
        return f"Linear probe, accuracy, {context.data.describe()}"

    def score(self, context: EvalContext) -> Scores:
        probe = replace(context.probe, penalties=self.penalties or context.probe.penalties)
        return {
            source: {name: accuracy(probe.linear(x, train, y), test) for name, train, test in context.labels()}
            for source, x, y in context.sources("linear")
        }


@dataclass(frozen=True)
class KNNProbe(EvalProtocol):
    """Weighted k-nearest-neighbor classification (Wu et al. 2018).

    Args:
        neighbors: Number of neighbors; None for that of the run's own probe.
        temperature: Temperature of the weights; None for that of the run's own probe.
    """

    neighbors: PositiveInt | None
    temperature: PositiveFloat | None

    def options(self, context: EvalContext) -> tuple[int, float]:
        """Return the number of neighbors and the temperature."""
        return self.neighbors or context.probe.neighbors, self.temperature or context.probe.temperature

    def describe(self, context: EvalContext) -> str:
        neighbors, temperature = self.options(context)
        return f"k-NN ({neighbors} neighbors, temperature {temperature:g}), accuracy, {context.data.describe()}"

    def score(self, context: EvalContext) -> Scores:
        neighbors, temperature = self.options(context)
        return {
            source: {name: accuracy(knn(x, train, y, neighbors, temperature), test) for name, train, test in context.labels()}
            for source, x, y in context.sources("knn")
        }
