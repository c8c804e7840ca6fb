"""The collapse watch: do different images still get different features?

All figures are taken across images, on pooled features as they are (layer-normalized ones look healthy even when every
image is the same). The verdict compares a network with itself before training, because a healthy untrained network's
features may lie close together too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 3): exp of the entropy of the singular values of [N, D], from 1 to min(N, D)."""
    return entropy_rank(torch.linalg.svdvals(features.cpu().double()))  # Apple GPUs have no float64


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of the shares of non-negative values [D] in their sum."""
    share = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(share * share.log()).sum()).item()


def feature_spread(features: Tensor) -> dict[str, float]:
    """How features [N, D] differ across images.

    Returns:
        `std`: mean standard deviation per dimension; `norm`: mean length; `variation`: std over root mean square, 0 when all
        images are the same; `cosine`: mean cosine between different images; `rank`: effective rank of the centered features.
    """
    features = features.float()
    n = len(features)
    unit = F.normalize(features, dim=1)
    cosine = (unit.sum(0).square().sum() - n) / (n * (n - 1))
    centered = features - features.mean(0)
    rms = features.square().mean().sqrt().clamp(min=1e-12)
    return {
        "std": features.std(0).mean().item(),
        "norm": features.norm(dim=1).mean().item(),
        "variation": (centered.square().mean().sqrt() / rms).item(),
        "cosine": cosine.item(),
        "rank": effective_rank(centered),
    }


def verdict(now: dict[str, float], untrained: dict[str, float]) -> str | None:
    """What kind of collapse `feature_spread` figures show beside the untrained network's, in words; None if healthy."""
    if now["variation"] < 0.1 * untrained["variation"]:
        return (
            f"complete collapse: features of different images differ by {now['variation']:.2g} of their size "
            f"(untrained: {untrained['variation']:.2g})"
        )
    if now["rank"] < 0.25 * untrained["rank"]:
        return f"dimensional collapse: features fill {now['rank']:.1f} dimensions (untrained: {untrained['rank']:.1f})"
    return None
