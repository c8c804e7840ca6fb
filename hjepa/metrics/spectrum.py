"""Quality of features without labels: how they are spread, how many dimensions they fill, how fast their spectrum falls."""

import torch
from torch import Tensor

from hjepa.metrics.collapse import effective_rank, entropy_rank, feature_spread

FIRST, LAST = 11, 100  # eigenvalues that the power law is fitted to, counted from 1, as Agrawal et al. and Stringer et al. do


def feature_statistics(features: Tensor) -> dict[str, float]:
    """Figures of features [N, F] as they are: `feature_spread`'s (its rank is the effective rank of Roy & Vetterli 2007,
    of the centered features), `rankme` (Garrido et al. 2023, of the features as they are), `alpha` (Agrawal et al. 2022).
    """
    alpha = alpha_req(features)
    return feature_spread(features) | {"rankme": effective_rank(features)} | ({} if alpha is None else {"alpha": alpha})


def alpha_req(features: Tensor) -> float | None:
    """alpha-ReQ (Agrawal et al. 2022, eq. 2): the exponent of the power law i^-alpha that the eigenvalues of the covariance of
    [N, F] follow; about 1 is best, more means that few directions carry everything.

    The fit is that of the authors, Stringer et al.'s (2019): least squares on logarithms with weights 1 / i over eigenvalues 11
    to 100, or all of them where there are fewer than 20. None for features of one dimension or none.
    """
    centered = (features - features.mean(0)).cpu().double()
    values = torch.linalg.svdvals(centered).square() / (len(features) - 1)
    values = values[values > values[0] * 1e-12]  # the rank may be smaller than the width
    if len(values) < 2:
        return None
    first = FIRST if len(values) >= 20 else 1
    place = torch.arange(first, min(LAST, len(values)) + 1, dtype=torch.float64)
    x, y, weight = place.log(), values[first - 1 : LAST].log(), 1 / place
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return -((weight * x * y).sum() / (weight * x * x).sum()).item()


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2023, eqs. 1 to 4): the effective rank of the between-image covariance of [n, q, F] whitened by the
    within-image one, which `delta` makes invertible.
    """
    n, q, width = views.shape
    views = views.double()
    means = views.mean(1)
    between, within = means - means.mean(0), (views - means[:, None]).flatten(0, 1)
    covariance = within.T @ within / (n * (q - 1)) + delta * torch.eye(width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    whitened = between @ (vectors * values.rsqrt()) / (n - 1) ** 0.5
    return entropy_rank(torch.linalg.svdvals(whitened).square())
