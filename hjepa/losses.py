"""Objectives: a prediction loss over the levels plus an optional regularizer of the student's features.

An objective is called on the model's `Output` and returns `(scalar, {name: 0-d tensor})`. The scalar is minimized; the named
terms are unweighted, detached, and stay on the device until they are logged. Prediction losses compare the predictions of a level
with the teacher's targets. Regularizers keep the student's pooled features from collapsing, and make the views of an image agree;
with `levels=none` the regularizer is the whole objective.

To add a loss, write a subclass of `PredictionLoss` with `distance` and a file in conf/loss/ that names it. To add a
regularizer, write a subclass of `Regularizer` with `terms` and a file in conf/regularizer/.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from hjepa.distributed.process_group import broadcast_from_main
from hjepa.models.output import LevelOutput, Output

Scalar = Float[Tensor, ""]
Features = Float[Tensor, "b v d"]

# -- prediction losses -------------------------------------------------------------------------------------------------


class PredictionLoss(ABC):
    """Base class of prediction losses of a level."""

    @abstractmethod
    def distance(self, prediction: Float[Tensor, "*shape d"], target: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
        """Compute the distance between each prediction and its target."""

    def level_loss(self, level: LevelOutput) -> Scalar:
        """Compute the mean distance over the predictions of a level that count."""
        return mean_of_valid(self.distance(level.prediction.float(), level.target), level.valid)


class SmoothL1(PredictionLoss):
    """Smooth L1 loss (Girshick 2015), as in I-JEPA.

    Args:
        beta: The loss of a difference d is 0.5 d^2 / beta for |d| < beta, and |d| - 0.5 beta otherwise.
    """

    def __init__(self, beta: PositiveFloat = 1.0) -> None:
        self.beta = beta

    def distance(self, prediction: Float[Tensor, "*shape d"], target: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=self.beta).mean(-1)


class MSE(PredictionLoss):
    """Mean squared error."""

    def distance(self, prediction: Float[Tensor, "*shape d"], target: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
        return F.mse_loss(prediction, target, reduction="none").mean(-1)


class Cosine(PredictionLoss):
    """One minus the cosine similarity."""

    def distance(self, prediction: Float[Tensor, "*shape d"], target: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
        return 1 - F.cosine_similarity(prediction, target, dim=-1)


class Contrastive(Cosine):
    """InfoNCE (van den Oord et al. 2018): a prediction must be nearer to its target than to the targets of other images.

    -log(e^p / (e^p + sum of e^n)), where p is the cosine similarity of a prediction to its target, and n are its similarities to
    all target cells of the other images in the same group (see `LevelOutput`), all divided by the temperature. Between projected
    whole views, this is the NT-Xent loss of SimCLR (Chen et al. 2020).

    Args:
        temperature: Divisor of the similarities; lower values put more weight on the nearest negatives.
    """

    def __init__(self, temperature: PositiveFloat) -> None:
        self.temperature = temperature

    def level_loss(self, level: LevelOutput) -> Scalar:
        prediction, target, cells = level.prediction.float(), level.target.float(), level.cells.float()
        positives = (1 - self.distance(prediction, target)) / self.temperature
        negatives = log_sum_of_negatives(F.normalize(prediction, dim=-1) / self.temperature, F.normalize(cells, dim=-1))
        return mean_of_valid(F.softplus(negatives - positives), level.valid)


def mean_of_valid(values: Float[Tensor, "b g q"], valid: Bool[Tensor, "b g q"] | None) -> Scalar:
    """Compute the mean of the values that count, or 0 if there is none; None counts all."""
    if valid is None:
        return values.mean()
    return (values * valid).sum() / valid.sum().clamp(min=1)


def log_sum_of_negatives(queries: Float[Tensor, "b g q d"], keys: Float[Tensor, "b g k d"]) -> Float[Tensor, "b g q"]:
    """Compute log(sum of e^(query . key)) over the keys of all other images in the same group."""
    b, g, q, _ = queries.shape
    similarity = queries.transpose(0, 1).flatten(1, 2) @ keys.transpose(0, 1).flatten(1, 2).mT  # [G, B*Q, B*K]
    same_image = similarity.view(g, b, q, b, -1).diagonal(dim1=1, dim2=3)
    same_image.fill_(-math.inf)
    return similarity.logsumexp(-1).view(g, b, q).transpose(0, 1)


# -- regularizers ------------------------------------------------------------------------------------------------------


class Regularizer(ABC):
    """Base class of regularizers: weighted terms on the student's features of some levels.

    Statistics are computed over all processes, for one micro-batch at a time (see `train.accumulate`).

    Args:
        weights: Weight of each term by name.
        levels: Factor of each level, from the first; levels beyond the list are not regularized. The features of a level are
            the student's hidden states at the level's depth, averaged over the visible patches.

    Attributes:
        needs_several_views: True if there is nothing to minimize with one view and one context per image.
    """

    needs_several_views = False

    def __init__(self, weights: dict[str, float], levels: list[float]) -> None:
        if not levels:
            raise UserError("regularizer.levels=[]: expected one factor or more; choose regularizer=none to leave it out.")
        self.weights, self.levels = weights, levels

    @abstractmethod
    def terms(self, features: Features, num_global: int) -> dict[str, Scalar]:
        """Compute the terms by name.

        Args:
            features: Features of V views of each image.
            num_global: Number of views, from the first, that show global crops; the others are local crops.
        """

    def __call__(self, output: Output) -> tuple[Scalar, dict[str, Scalar]]:
        """Compute the weighted sum and the terms; from the second level on, names end with the level's number."""
        total, named = output.zero(), {}
        for number, (factor, features) in enumerate(zip(self.levels, output.features, strict=False), start=1):
            if factor:
                for name, term in self.terms(features.float(), output.num_global).items():
                    total = total + factor * self.weights[name] * term
                    named[name if number == 1 else f"{name}_level{number}"] = term.detach()
        return total, named


class VICReg(Regularizer):
    """VICReg (Bardes et al. 2022, eq. 1-5), used as in C-JEPA (Mo & Tong 2024).

    Every dimension keeps a standard deviation of at least 1 over the batch, dimensions are decorrelated, and the views and
    contexts of an image agree.

    Args:
        variance: Weight of the hinge loss on the standard deviations.
        invariance: Weight of the squared differences between views; no such term with one view and context per image.
        covariance: Weight of the squared covariances.
        levels: See `Regularizer`.
    """

    def __init__(
        self,
        variance: NonNegativeFloat,
        invariance: NonNegativeFloat,
        covariance: NonNegativeFloat,
        levels: list[NonNegativeFloat],
    ) -> None:
        super().__init__({"variance": variance, "invariance": invariance, "covariance": covariance}, levels)

    def terms(self, features: Features, num_global: int) -> dict[str, Scalar]:
        terms = {"variance": variance_hinge(features), "covariance": squared_covariance(features)}
        return terms | ({"invariance": pairwise_view_distance(features)} if features.shape[1] > 1 else {})


class SIGReg(Regularizer):
    """Sketched isotropic Gaussian regularization (LeJEPA, Balestriero & LeCun 2025).

    The features of a batch are pulled towards a standard normal distribution along random directions, by the Epps-Pulley test
    of their characteristic function, and the views of an image towards the mean of its global crops.

    Args:
        gaussianity: Weight of the Epps-Pulley statistic.
        invariance: Weight of the squared distances to the mean; no such term with one view and context per image.
        directions: Number of random projections, sampled anew in each step.
        knots: Number of points, at least 2, of the trapezoidal quadrature over t in [0, `reach`]; the integrand is even.
        reach: Upper end of the quadrature.
        levels: See `Regularizer`.
    """

    def __init__(
        self,
        gaussianity: NonNegativeFloat,
        invariance: NonNegativeFloat,
        directions: PositiveInt,
        knots: PositiveInt,
        reach: PositiveFloat,
        levels: list[NonNegativeFloat],
    ) -> None:
        super().__init__({"gaussianity": gaussianity, "invariance": invariance}, levels)
        if knots < 2:
            raise UserError(f"regularizer.knots={knots}: expected at least 2 points, the ends of the interval.")
        self.directions, self.knots, self.reach = directions, knots, reach

    def terms(self, features: Features, num_global: int) -> dict[str, Scalar]:
        directions = F.normalize(
            broadcast_from_main(torch.randn(features.shape[-1], self.directions, device=features.device)), dim=0
        )
        terms = {"gaussianity": epps_pulley(features.transpose(0, 1) @ directions, self.knots, self.reach)}
        if features.shape[1] > 1:
            terms["invariance"] = (features - features[:, :num_global].mean(1, keepdim=True)).square().mean()
        return terms


class InfoNCE(Regularizer):
    """InfoNCE (van den Oord et al. 2018) between views, as NT-Xent in SimCLR (Chen et al. 2020) for any number of views.

    The positives of a view are the other global crops of its image, and its negatives are the global crops of all other images.

    Args:
        contrast: Weight of the term; no such term with one view and context per image.
        temperature: Divisor of the cosine similarities; lower values put more weight on the nearest negatives.
        levels: See `Regularizer`.
    """

    needs_several_views = True

    def __init__(self, contrast: NonNegativeFloat, temperature: PositiveFloat, levels: list[NonNegativeFloat]) -> None:
        super().__init__({"contrast": contrast}, levels)
        self.temperature = temperature

    def terms(self, features: Features, num_global: int) -> dict[str, Scalar]:
        return {"contrast": info_nce(features, num_global, self.temperature)} if features.shape[1] > 1 else {}


# -- statistics of features --------------------------------------------------------------------------------------------


def variance_hinge(features: Features) -> Scalar:
    """Compute how far standard deviations over the batch are below 1, averaged over views and dimensions."""
    return F.relu(1 - (features.var(0) + 1e-4).sqrt()).mean()


def squared_covariance(features: Features) -> Scalar:
    """Sum the squared covariances of different dimensions, divide by D, and average over views."""
    centered = (features - features.mean(0)).transpose(0, 1)
    covariance = centered.mT @ centered / (centered.shape[1] - 1)
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    return (covariance.square().sum() - diagonal.square().sum()) / features[0].numel()


def pairwise_view_distance(features: Features) -> Scalar:
    """Compute the mean squared difference between two views of an image over all pairs of views."""
    return 2 * features.var(1).mean()


def epps_pulley(samples: Float[Tensor, "*shape n m"], knots: int, reach: float) -> Scalar:
    """Compute the statistic of Epps & Pulley (1983) that tests N samples against N(0, 1), averaged over the other dimensions.

    N * integral of |empirical characteristic function(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, over t in [-reach, reach].
    """
    t = torch.linspace(0, reach, knots, device=samples.device)
    normal = torch.exp(-t.square() / 2)
    angles = samples.unsqueeze(-1) * t
    distance = (angles.cos().mean(-3) - normal).square() + angles.sin().mean(-3).square()
    return samples.shape[-2] * 2 * torch.trapezoid(distance * normal, t).mean()


def info_nce(features: Features, num_global: int, temperature: float) -> Scalar:
    """Compute -log(e^p / (e^p + sum of e^n)), averaged over all positive pairs p.

    Here p is the similarity of a view to another global crop of its image, and n are the similarities of the view to the global
    crops of the other images, all cosines divided by the temperature.
    """
    unit = F.normalize(features, dim=-1)
    views, targets = unit.unsqueeze(1) / temperature, unit[:, None, :num_global]
    negatives = log_sum_of_negatives(views, targets)[:, 0]  # [B, V]
    positives = (views @ targets.mT)[:, 0]  # [B, V, num_global]
    losses = F.softplus(negatives.unsqueeze(-1) - positives)
    different_views = ~torch.eye(*losses.shape[1:], dtype=torch.bool, device=features.device)
    return (losses * different_views).sum() / (len(losses) * different_views.sum())


# -- the objective -----------------------------------------------------------------------------------------------------


class Objective:
    """The prediction losses of all levels plus the regularizer, if any.

    Args:
        loss: The prediction loss of all levels but those of `level_losses`.
        regularizer: The regularizer, or None.
        level_losses: Prediction losses of single levels by name.
    """

    def __init__(
        self, loss: PredictionLoss, regularizer: Regularizer | None, level_losses: Mapping[str, PredictionLoss] | None = None
    ) -> None:
        self.loss, self.regularizer, self.level_losses = loss, regularizer, dict(level_losses or {})

    @property
    def num_regularized_levels(self) -> int:
        """Number of levels whose features the regularizer reads."""
        return len(self.regularizer.levels) if self.regularizer else 0

    def prediction_loss(self, output: Output) -> tuple[Scalar, dict[str, Scalar]]:
        """Compute the weighted sum of the losses of the levels, and the loss of every level by name."""
        losses = {level.name: self.loss_of(level).level_loss(level) for level in output.levels}
        total = sum((level.weight * losses[level.name] for level in output.levels), output.zero())
        return total, {name: value.detach() for name, value in losses.items()}

    def loss_of(self, level: LevelOutput) -> PredictionLoss:
        """Return the prediction loss of a level."""
        return self.level_losses.get(level.name, self.loss)

    @torch.no_grad()
    def constant_baseline(self, output: Output) -> Scalar:
        """Compute the loss of predicting the mean target everywhere, which any useful predictor must beat."""
        total = output.zero()
        for level in output.levels:
            target = level.target.float()
            mean = target.flatten(0, -2).mean(0).expand_as(target)
            total += level.weight * self.loss_of(level).level_loss(replace(level, prediction=mean))
        return total

    def __call__(self, output: Output) -> tuple[Scalar, dict[str, Scalar]]:
        """Compute the sum to minimize and all terms by name; `prediction` is the loss without the regularizer."""
        prediction, terms = self.prediction_loss(output)
        terms["prediction"] = prediction.detach()
        if self.regularizer is None:
            return prediction, terms
        regularization, regularizer_terms = self.regularizer(output)
        return prediction + regularization, terms | regularizer_terms
