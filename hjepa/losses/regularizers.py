"""Regularizers: terms that keep the student's pooled features from collapsing, and make the views of an image agree."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from hjepa.distributed.process_group import broadcast_from_main
from hjepa.losses.statistics import (
    Features,
    Scalar,
    epps_pulley,
    info_nce,
    pairwise_view_distance,
    squared_covariance,
    variance_hinge,
)
from hjepa.models.output import Output


class Regularizer(ABC):
    """Base class of regularizers: weighted terms on the student's features of some levels.

    Statistics are computed over all processes, for one micro-batch at a time (see `train.accumulate`).

    Args:
        weights: Weight of each term by name.
        levels: Factor of each level, from the first; levels beyond the list are not regularized. The features of a level are
            the student's hidden states at the level's depth, averaged over the visible patches.

    Attributes:
        regularized_levels: Indices of the levels with a factor above 0.
        needs_several_views: True if there is nothing to minimize with one view and one context per image.
    """

    needs_several_views = False

    def __init__(self, weights: dict[str, float], levels: list[float]) -> None:
        if not any(levels):
            raise UserError(f"regularizer.levels={levels}: expected a factor above 0; choose regularizer=none to leave it out.")
        self.weights, self.levels = weights, levels
        self.regularized_levels = [index for index, factor in enumerate(levels) if factor]

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
        for index, features in zip(self.regularized_levels, output.features, strict=True):
            for name, term in self.terms(features.float(), output.num_global).items():
                total = total + self.levels[index] * self.weights[name] * term
                named[f"{name}_level{index + 1}" if index else name] = term.detach()
        return total, named


class VICReg(Regularizer):
    """VICReg (Bardes et al. 2022, eq. 1-5), used as in C-JEPA (Mo & Tong 2024).

    The terms are means over views and, for the invariance, over dimensions, where the equations of the paper have sums.
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
