"""Projectors of the levels, after which predictions and targets are compared."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.levels import Level


def build_heads(levels: list[Level], projector: Callable[..., nn.Module] | None) -> nn.ModuleDict:
    """Return the projectors of the levels that are compared after one; raise `UserError` if there is no projector."""
    projected = [level for level in levels if level.project]
    if projected and projector is None:
        raise UserError("levels.project=true needs a projector; choose projector=mlp, or set levels.project=[false].")
    return nn.ModuleDict({level.name: projector(dim=level.dim) for level in projected if projector})


def project(head: nn.Module, tokens: Float[Tensor, "b k _"]) -> Float[Tensor, "b k _"]:
    """Apply a projector to all tokens of each image."""
    projected: Tensor = head(tokens.flatten(0, 1))
    return projected.unflatten(0, tokens.shape[:2])


def normalize_targets(cells: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
    """Normalize every target cell to mean 0 and variance 1, without learned parameters."""
    return F.layer_norm(cells.float(), cells.shape[-1:])
