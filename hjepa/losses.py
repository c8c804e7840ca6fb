"""Objectives: a prediction loss, averaged over target cells and summed over levels, and an optional regularizer (see
`hjepa.losses`).

A loss is called as `loss(output) -> (scalar, {name: 0-d tensor})`; the terms are detached and stay on the device until they
are logged. To add one, write one class with `distance` here and one YAML in conf/loss.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError

if TYPE_CHECKING:
    from hjepa.models.hjepa import Output
import math

from hjepa.distributed.process_group import broadcast_from_main


class PredictionLoss(ABC):
    """sum over levels of weight_l * mean over cells of distance(prediction, target)."""

    @abstractmethod
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean distance of two tensors [..., D] as a 0-d tensor."""

    def __call__(self, output: "Output") -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum to minimize and every level's own term, unweighted and detached."""
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


class Regularizer(ABC):
    """Weighted terms on the features of some levels.

    The statistics are those of the part of the batch that is computed at once (see `train.accumulate`), over all processes.

    Args:
        weights: of the terms, by name.
        levels: factor of each level, the first level first; levels beyond the list are left alone. A level's features are the
            student's hidden state at the level's depth, pooled over the patches it sees.
    """

    needs_several_views = False  # whether there is nothing for it to do with one view and context per image

    def __init__(self, weights: dict[str, float], levels: list[float]) -> None:
        if min(weights.values()) < 0 or not levels or min(levels) < 0:
            given = ", ".join(f"regularizer.{name}={weight}" for name, weight in weights.items())
            raise UserError(f"{given}, regularizer.levels={list(levels)}: expected weights of at least 0, one level or more.")
        self.weights, self.levels = weights, levels

    @abstractmethod
    def terms(self, features: Tensor, num_global: int) -> dict[str, Tensor]:
        """The terms by name, 0-d, of features [B, V, D]: V views of each image, the first `whole` of them not local crops."""

    def __call__(self, output: "Output") -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and the terms by name (and level, beyond the first), unweighted and detached."""
        total, named = output.zero(), {}
        for number, (factor, features) in enumerate(zip(self.levels, output.features, strict=False), start=1):
            if factor:
                for name, term in self.terms(features.float(), output.num_global).items():
                    total = total + factor * self.weights[name] * term
                    named[name if number == 1 else f"{name}_level{number}"] = term.detach()
        return total, named


class VICReg(Regularizer):
    """VICReg (Bardes et al. 2022, eq. 1-5), as in C-JEPA (Mo & Tong 2024): every dimension keeps a standard deviation of at
    least 1 over the batch, no two are redundant, and the views (also: contexts) of an image agree.

    Args:
        variance, invariance, covariance: weights of the terms; there is no invariance with one view and context per image.
        levels: see `Regularizer`.
    """

    def __init__(self, variance: float, invariance: float, covariance: float, levels: list[float]) -> None:
        super().__init__({"variance": variance, "invariance": invariance, "covariance": covariance}, levels)

    def terms(self, features: Tensor, num_global: int) -> dict[str, Tensor]:
        found = {"variance": hinge_variance(features), "covariance": redundancy(features)}
        return found | ({"invariance": disagreement(features)} if features.shape[1] > 1 else {})


class SIGReg(Regularizer):
    """Sketched isotropic Gaussian regularization (LeJEPA, Balestriero & LeCun 2025): along random directions the features of
    the batch shall be distributed as a standard normal, by the Epps-Pulley test of their characteristic function; and, as
    there, the views of an image shall agree with the mean of its whole views.

    Args:
        gaussianity, invariance: weights of the two terms; there is no invariance with one view and context per image.
        directions: random projections, drawn anew in each step.
        knots: quadrature points of the test's integral over t in [0, `reach`], trapezoidal; the integrand is even.
        levels: see `Regularizer`.
    """

    def __init__(
        self, gaussianity: float, invariance: float, directions: int, knots: int, reach: float, levels: list[float]
    ) -> None:
        super().__init__({"gaussianity": gaussianity, "invariance": invariance}, levels)
        if directions < 1 or knots < 2 or reach <= 0:
            raise UserError(
                f"regularizer.directions={directions}, knots={knots} and reach={reach}: expected at least 1 direction, "
                "2 knots and a positive reach."
            )
        self.directions, self.knots, self.reach = directions, knots, reach

    def terms(self, features: Tensor, num_global: int) -> dict[str, Tensor]:
        directions = F.normalize(
            broadcast_from_main(torch.randn(features.shape[-1], self.directions, device=features.device)), dim=0
        )
        found = {"gaussianity": epps_pulley(features.transpose(0, 1) @ directions, self.knots, self.reach)}
        if features.shape[1] > 1:
            found["invariance"] = (features - features[:, :num_global].mean(1, keepdim=True)).square().mean()
        return found


class InfoNCE(Regularizer):
    """InfoNCE (van den Oord et al. 2018) over the views of a batch, as SimCLR's NT-Xent (Chen et al. 2020) for any number of
    views: a view shall be nearer, in angle, to each other whole view of its image than to the whole views of all other images.

    Args:
        contrast: weight of the term; there is none with one view and context per image.
        temperature: of the similarities; the lower, the more the nearest of the other images count.
        levels: see `Regularizer`.
    """

    needs_several_views = True

    def __init__(self, contrast: float, temperature: float, levels: list[float]) -> None:
        super().__init__({"contrast": contrast}, levels)
        if temperature <= 0:
            raise UserError(f"regularizer.temperature={temperature} must be positive.")
        self.temperature = temperature

    def terms(self, features: Tensor, num_global: int) -> dict[str, Tensor]:
        return {"contrast": contrast(features, num_global, self.temperature)} if features.shape[1] > 1 else {}


class Objective:
    """What is minimized: the prediction loss plus the regularizer, if any."""

    def __init__(self, loss: PredictionLoss, regularizer: Regularizer | None) -> None:
        self.loss, self.regularizer = loss, regularizer

    @property
    def num_regularized_levels(self) -> int:
        """How many levels' features the regularizer reads."""
        return len(self.regularizer.levels) if self.regularizer else 0

    def __call__(self, output: "Output") -> tuple[Tensor, dict[str, Tensor]]:
        """The sum to minimize and every term by name; `prediction` is the loss without the regularizer."""
        prediction, terms = self.loss(output)
        terms["prediction"] = prediction.detach()
        if self.regularizer is None:
            return prediction, terms
        extra, more = self.regularizer(output)
        return prediction + extra, terms | more


def hinge_variance(features: Tensor) -> Tensor:
    """Mean over views and dimensions of how far the standard deviation of [B, V, D] over the batch is below 1."""
    return F.relu(1 - (features.var(0) + 1e-4).sqrt()).mean()


def redundancy(features: Tensor) -> Tensor:
    """Squared covariances between different dimensions of [B, V, D], summed, over D; the mean over views."""
    centered = (features - features.mean(0)).transpose(0, 1)
    covariance = centered.mT @ centered / (centered.shape[1] - 1)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    return (covariance.square().sum() - diagonal.square().sum()) / features[0].numel()


def disagreement(features: Tensor) -> Tensor:
    """Mean squared difference between two views of an image, over all pairs of the V views of [B, V, D]."""
    return 2 * features.var(1).mean()


def contrast(features: Tensor, num_global: int, temperature: float) -> Tensor:
    """-log(e^p / (e^p + sum of e^n)) of features [B, V, D], the mean over all p, the cosine of a view with another whole view
    of its image over the temperature; n are those of the view with the whole views of the other images.
    """
    count, views = features.shape[:2]
    unit = F.normalize(features, dim=-1)
    similar = (unit.flatten(0, 1) @ unit[:, :num_global].flatten(0, 1).mT / temperature).view(count, views, count, num_global)
    same = torch.eye(count, dtype=torch.bool, device=features.device).view(count, 1, count, 1)
    negatives = similar.masked_fill(same, -math.inf).flatten(2).logsumexp(-1, keepdim=True)
    positives = similar.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [B, V, whole]
    costs = F.softplus(negatives - positives)
    others = ~torch.eye(views, num_global, dtype=torch.bool, device=features.device)
    return (costs * others).sum() / (count * others.sum())


def epps_pulley(samples: Tensor, knots: int, reach: float) -> Tensor:
    """Epps & Pulley's (1983) statistic of samples [..., N, M] against N(0, 1) along N, the mean over all else:

    N * integral of |empirical characteristic function(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, over t in [-reach, reach].
    """
    t = torch.linspace(0, reach, knots, device=samples.device)
    normal = torch.exp(-t.square() / 2)
    angles = samples.unsqueeze(-1) * t
    distance = (angles.cos().mean(-3) - normal).square() + angles.sin().mean(-3).square()
    return samples.shape[-2] * 2 * torch.trapezoid(distance * normal, t).mean()
