"""The objective of a run: the prediction losses of its levels plus a regularizer."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from hjepa.losses.prediction import PredictionLoss
from hjepa.losses.regularizers import Regularizer
from hjepa.losses.statistics import Scalar
from hjepa.models.output import LevelOutput, Output


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
    def regularized_levels(self) -> list[int]:
        """Indices of the levels whose features the regularizer reads."""
        return self.regularizer.regularized_levels if self.regularizer else []

    @property
    def compares_images(self) -> bool:
        """Whether the prediction loss of some level compares predictions with the targets of other images."""
        return any(loss.compares_images for loss in (self.loss, *self.level_losses.values()))

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
