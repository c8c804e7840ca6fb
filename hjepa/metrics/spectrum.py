"""Quality measures of features that need no labels: variation across images, effective dimensions, decay of the spectrum."""

import torch
from torch import Tensor

from hjepa.metrics.collapse import collapse_statistics, effective_rank, entropy_rank

# Range of eigenvalues, counted from 1, to which Agrawal et al. and Stringer et al. fit the power law.
FIRST_EIGENVALUE, LAST_EIGENVALUE = 11, 100


def feature_statistics(features: Tensor) -> dict[str, float]:
    """Measure features [N, F].

    Returns:
        The values of `collapse_statistics`, `rankme` (Garrido et al. 2023, the effective rank without centering) and, if it is
        defined, `alpha` (see `alpha_req`).
    """
    alpha = alpha_req(features)
    return collapse_statistics(features) | {"rankme": effective_rank(features)} | ({} if alpha is None else {"alpha": alpha})


def alpha_req(features: Tensor) -> float | None:
    """Return alpha-ReQ (Agrawal et al. 2022, eq. 2): the exponent of the power law i^-alpha of the covariance's eigenvalues.

    An exponent of about 1 is best; a larger one means that a few directions carry most of the variance. The fit follows the
    authors and Stringer et al. (2019): least squares on logarithms with weights 1 / i over eigenvalues 11 to 100, or over all
    eigenvalues if there are fewer than 20. Returns None for features [N, F] that vary along fewer than two dimensions.
    """
    centered = (features - features.mean(0)).cpu().double()
    values = torch.linalg.svdvals(centered).square() / (len(features) - 1)
    values = values[values > values[0] * 1e-12]  # the rank may be smaller than the width
    if len(values) < 2:
        return None
    first = FIRST_EIGENVALUE if len(values) >= 20 else 1
    index = torch.arange(first, min(LAST_EIGENVALUE, len(values)) + 1, dtype=torch.float64)
    x, y, weight = index.log(), values[first - 1 : LAST_EIGENVALUE].log(), 1 / index
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return -((weight * x * y).sum() / (weight * x * x).sum()).item()


def lidar(views: Tensor, delta: float = 1e-4) -> float | None:
    """Return LiDAR (Thilak et al. 2023, eqs. 1 to 4) of the features [n, q, F] of q views of each of n images.

    LiDAR is the effective rank of the between-image covariance, whitened by the within-image covariance. `delta` is added to the
    diagonal of the latter to make it invertible. Returns None for a single image.
    """
    n, q, width = views.shape
    if n < 2:
        return None
    views = views.double()
    means = views.mean(1)
    between, within = means - means.mean(0), (views - means[:, None]).flatten(0, 1)
    covariance = within.T @ within / (n * (q - 1)) + delta * torch.eye(width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    whitened = between @ (vectors * values.rsqrt()) / (n - 1) ** 0.5
    return entropy_rank(torch.linalg.svdvals(whitened).square())
