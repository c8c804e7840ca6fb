"""Objectives: a prediction loss, averaged over target cells and summed over levels, and an optional regularizer.

A loss is called as `loss(output) -> (scalar, {name: 0-d tensor})`; the terms are detached and stay on the device until they
are logged. To add one, write one class with `distance` here and one YAML in conf/loss.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.errors import UserError

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
        total = torch.stack([level.weight * distances[level.name] for level in output.levels]).sum()
        return total, {name: value.detach() for name, value in distances.items()}

    @torch.no_grad()
    def constant(self, output: "Output") -> Tensor:
        """The loss of always predicting one vector per level, the mean target: what any useful prediction must beat."""
        losses = []
        for level in output.levels:
            mean = level.target.flatten(0, -2).mean(0)
            losses.append(level.weight * self.distance(mean.expand_as(level.target), level.target))
        return torch.stack(losses).sum()


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


class VICReg:
    """VICReg (Bardes et al. 2022, eq. 1-5) on the student's pooled features, as in C-JEPA (Mo & Tong 2024): every dimension
    keeps a standard deviation of at least 1 over the batch, no two are redundant, and the contexts of an image agree.

    The statistics are those of the part of the batch that is computed at once (see `train.accumulate`).

    Args:
        variance, invariance, covariance: weights of the terms; there is no invariance term with one context per image.
    """

    def __init__(self, variance: float, invariance: float, covariance: float) -> None:
        if min(variance, invariance, covariance) < 0:
            raise UserError(
                f"regularizer.variance={variance}, invariance={invariance} and covariance={covariance} must not be negative."
            )
        self.weights = {"variance": variance, "invariance": invariance, "covariance": covariance}

    def __call__(self, output: "Output") -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and the terms, unweighted and detached."""
        features = output.features.float()
        terms = {"variance": hinge_variance(features), "covariance": redundancy(features)}
        if features.shape[1] > 1:
            terms["invariance"] = disagreement(features)
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total, {name: term.detach() for name, term in terms.items()}


def hinge_variance(features: Tensor) -> Tensor:
    """Mean over views and dimensions of how far the standard deviation of [B, V, D] over the batch is below 1."""
    return F.relu(1 - (features.var(0) + 1e-4).sqrt()).mean()


def redundancy(features: Tensor) -> Tensor:
    """Squared covariances between different dimensions of [B, V, D], summed, over D; the mean over views."""
    centred = (features - features.mean(0)).transpose(0, 1)
    covariance = centred.mT @ centred / (centred.shape[1] - 1)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    return (covariance.square().sum() - diagonal.square().sum()) / features[0].numel()


def disagreement(features: Tensor) -> Tensor:
    """Mean squared difference between two views of an image, over all pairs of the V views of [B, V, D]."""
    return 2 * features.var(1).mean()


class Objective:
    """What is minimised: the prediction loss plus the regularizer, if any."""

    def __init__(self, loss: PredictionLoss, regularizer: VICReg | None) -> None:
        self.loss, self.regularizer = loss, regularizer

    def __call__(self, output: "Output") -> tuple[Tensor, dict[str, Tensor]]:
        """The sum to minimise and every term by name; `prediction` is the loss without the regularizer."""
        prediction, terms = self.loss(output)
        terms["prediction"] = prediction.detach()
        if self.regularizer is None:
            return prediction, terms
        extra, more = self.regularizer(output)
        return prediction + extra, terms | more
