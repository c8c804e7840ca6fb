"""Linear and k-NN accuracy of every source of features: the probe that a run is watched by in training, on all depths."""

from dataclasses import dataclass, replace

from hjepa.config.errors import UserError
from hjepa.metrics.probes import accuracy, knn
from hjepa.tasks.evaluate.protocol import EvalContext, Scores


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression.

    Args:
        penalties: L2 penalties, of which the best on a fifth of the images to fit on is taken; None for those of the probe.
    """

    penalties: list[float] | None

    def __post_init__(self) -> None:
        if self.penalties is not None and (not self.penalties or min(self.penalties) <= 0):
            raise UserError(f"task.linear.penalties={list(self.penalties)}: give at least one, all positive, or null.")

    def check(self, study: EvalContext) -> None:
        """Any labeled images will do."""
        study.labels()

    def about(self, study: EvalContext) -> str:
        return f"Linear probe, accuracy, {study.data.describe()}"

    def __call__(self, study: EvalContext) -> Scores:
        probe = replace(study.probe, penalties=self.penalties or study.probe.penalties)
        return {
            source: {name: accuracy(probe.linear(x, train, y), test) for name, train, test in study.labels()}
            for source, x, y in study.pairs("linear")
        }


@dataclass(frozen=True)
class KNNProbe:
    """Weighted k-NN vote (Wu et al. 2018).

    Args:
        neighbors, temperature: of the vote; None for those of the probe.
    """

    neighbors: int | None
    temperature: float | None

    def __post_init__(self) -> None:
        for name, value in (("neighbors", self.neighbors), ("temperature", self.temperature)):
            if value is not None and value <= 0:
                raise UserError(f"task.knn.{name}={value} must be positive, or null for that of the run's probe.")

    def check(self, study: EvalContext) -> None:
        """Any labeled images will do."""
        study.labels()

    def about(self, study: EvalContext) -> str:
        neighbors, temperature = self.options(study)
        return f"k-NN ({neighbors} neighbors, temperature {temperature:g}), accuracy, {study.data.describe()}"

    def options(self, study: EvalContext) -> tuple[int, float]:
        """Neighbors and temperature."""
        return self.neighbors or study.probe.neighbors, self.temperature or study.probe.temperature

    def __call__(self, study: EvalContext) -> Scores:
        neighbors, temperature = self.options(study)
        return {
            source: {name: accuracy(knn(x, train, y, neighbors, temperature), test) for name, train, test in study.labels()}
            for source, x, y in study.pairs("knn")
        }
