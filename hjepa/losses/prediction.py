"""Prediction losses: distances between the predictions of a level and its targets."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hjepa.config.types import PositiveFloat, PositiveInt
from hjepa.losses.negatives import log_sum_of_negatives, select_cells
from hjepa.losses.statistics import Scalar
from hjepa.models.output import LevelOutput


class PredictionLoss(ABC):
    """Base class of prediction losses of a level.

    Attributes:
        compares_images: True if predictions are compared with the targets of other images too.
    """

    compares_images = False

    @abstractmethod
    def distance(self, prediction: Float[Tensor, "*shape d"], target: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
        """Return the distance between each prediction and its target; targets are layer-normalized or projected."""

    def level_loss(self, level: LevelOutput) -> Scalar:
        """Return the mean distance over the valid predictions of a level (see `LevelOutput.valid`)."""
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
    whole views, this is the loss of MoCo v3 (Chen et al. 2021) in both directions; that of SimCLR has the other views too.

    Args:
        temperature: Divisor of the similarities; lower values put more weight on the nearest negatives.
        negatives: Largest number of target cells of each image that serve as negatives for the others; None for all. With many
            cells, most of the time of a level is spent on the similarities to them.
    """

    compares_images = True

    def __init__(self, temperature: PositiveFloat, negatives: PositiveInt | None = None) -> None:
        self.temperature, self.negatives = temperature, negatives

    def level_loss(self, level: LevelOutput) -> Scalar:
        prediction, target, cells = level.prediction.float(), level.target.float(), level.cells.float()
        if self.negatives is not None and self.negatives < cells.shape[2]:
            cells = select_cells(cells, self.negatives)
        positives = (1 - self.distance(prediction, target)) / self.temperature
        negatives = log_sum_of_negatives(F.normalize(prediction, dim=-1) / self.temperature, F.normalize(cells, dim=-1))
        return mean_of_valid(F.softplus(negatives - positives), level.valid)


def mean_of_valid(values: Float[Tensor, "b g q"], valid: Bool[Tensor, "b g q"] | None) -> Scalar:
    """Compute the mean of the values that count, or 0 if there is none; None counts all."""
    if valid is None:
        return values.mean()
    return (values * valid).sum() / valid.sum().clamp(min=1)
