"""Objectives: a prediction loss, averaged over target cells and summed over levels, and an optional regularizer (see
`hjepa.regularizers`).

A loss is called as `loss(output) -> (scalar, {name: 0-d tensor})`; the terms are detached and stay on the device until they
are logged. To add one, write one class with `distance` here and one YAML in conf/loss.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.errors import UserError
from hjepa.regularizers import Regularizer

if TYPE_CHECKING:
    from hjepa.model import Output


class PredictionLoss(ABC):
    """sum over levels of weight_l * mean over cells of distance(prediction, target)."""

    @abstractmethod
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean distance of two tensors [..., D] as a 0-d tensor."""

    def __call__(self, output: "Output") -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum to minimise and every level's own term, unweighted and detached."""
        distances = {level.name: self.distance(level.prediction.float(), level.target) for level in output.levels}
        total = sum((level.weight * distances[level.name] for level in output.levels), output.zero())
        return total, {name: value.detach() for name, value in distances.items()}

    @torch.no_grad()
    def constant(self, output: "Output") -> Tensor:
        """The loss of always predicting one vector per level, the mean target: what any useful prediction must beat."""
        total = output.zero()
        for level in output.levels:
            mean = level.target.flatten(0, -2).mean(0)
            total += level.weight * self.distance(mean.expand_as(level.target), level.target)
        return total


class SmoothL1(PredictionLoss):
    """Huber-like: 0.5 d^2 / beta below |d| = beta, |d| - 0.5 beta above (Girshick 2015); I-JEPA's loss."""

    def __init__(self, beta: float = 1.0) -> None:
        if beta <= 0:
            raise UserError(f"loss.beta={beta} must be positive; use loss=mse for a squared loss.")
        self.beta = beta

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(prediction, target, beta=self.beta)


class MSE(PredictionLoss):
    """Mean squared difference."""

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)


class Cosine(PredictionLoss):
    """One minus the cosine similarity."""

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()


class Objective:
    """What is minimised: the prediction loss plus the regularizer, if any."""

    def __init__(self, loss: PredictionLoss, regularizer: Regularizer | None) -> None:
        self.loss, self.regularizer = loss, regularizer

    @property
    def read(self) -> int:
        """How many levels' features the regularizer reads."""
        return len(self.regularizer.levels) if self.regularizer else 0

    def __call__(self, output: "Output") -> tuple[Tensor, dict[str, Tensor]]:
        """The sum to minimise and every term by name; `prediction` is the loss without the regularizer."""
        prediction, terms = self.loss(output)
        terms["prediction"] = prediction.detach()
        if self.regularizer is None:
            return prediction, terms
        extra, more = self.regularizer(output)
        return prediction + extra, terms | more
