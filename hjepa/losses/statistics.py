"""Statistics of the features of a batch, of which regularizers consist."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hjepa.losses.negatives import log_sum_of_negatives

Scalar = Float[Tensor, ""]
Features = Float[Tensor, "b v d"]


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
