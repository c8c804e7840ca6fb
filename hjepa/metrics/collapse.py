"""Collapse detection: do different images still have different features?

All statistics are taken across images, on pooled features without normalization (layer-normalized features look healthy even if
they are the same for every image). A network is compared with itself before training, because the features of a healthy untrained
network may also lie close together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDING = 1e-5  # variation of features that differ by rounding errors only


def effective_rank(features: Tensor) -> float:
    """Return RankMe (Garrido et al. 2023, eq. 3) of features [N, D]: exp of the entropy of the singular values.

    The value lies between 1 and min(N, D).
    """
    return entropy_rank(torch.linalg.svdvals(features.cpu().double()))  # Apple GPUs have no float64


def entropy_rank(values: Tensor) -> float:
    """Return exp of the entropy of non-negative values [D], normalized to sum to 1."""
    probabilities = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(probabilities * probabilities.log()).sum()).item()


def collapse_statistics(features: Tensor) -> dict[str, float]:
    """Measure how features [N, D] vary across images.

    Returns:
        `std`, the mean standard deviation per dimension; `norm`, the mean length; `variation`, the standard deviation divided by
        the root mean square, which is 0 if all images have the same features, and NaN for a single image; `cosine`, the mean
        cosine similarity of different images; and `rank`, the effective rank (Roy & Vetterli 2007) of the centered features.
    """
    features = features.float()
    n = len(features)
    normalized = F.normalize(features, dim=1)
    cosine = (normalized.sum(0).square().sum() - n) / (n * (n - 1))
    centered = features - features.mean(0)
    rms = features.square().mean().sqrt().clamp(min=1e-12)
    return {
        "std": features.std(0).mean().item(),
        "norm": features.norm(dim=1).mean().item(),
        "variation": (centered.square().mean().sqrt() / rms).item() if n > 1 else float("nan"),
        "cosine": cosine.item(),
        "rank": effective_rank(centered),
    }


def describe_collapse(statistics: dict[str, float], untrained: dict[str, float]) -> str | None:
    """Describe the collapse that `collapse_statistics` show beside those of the untrained network; return None if healthy.

    Features that do not differ at all are a collapse even if those of the untrained network do not differ either.
    """
    if statistics["variation"] < ROUNDING:
        return "complete collapse: features of different images do not differ at all"
    if statistics["variation"] < 0.1 * untrained["variation"]:
        return (
            f"complete collapse: features of different images differ by {statistics['variation']:.2g} of their size "
            f"(untrained: {untrained['variation']:.2g})"
        )
    if statistics["rank"] < 0.25 * untrained["rank"]:
        return f"dimensional collapse: features span {statistics['rank']:.1f} dimensions (untrained: {untrained['rank']:.1f})"
    return None
