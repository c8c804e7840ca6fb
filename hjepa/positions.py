"""Fixed 2-D sine-cosine positions, for patches and for the cells that a coarser level pools from them."""

import torch
from torch import Tensor


def grid_centres(grid: int, pool: int = 1) -> Tensor:
    """Centres (row, column) in patch units of the cells of `pool` x `pool` patches, raster order: float [(grid/pool)^2, 2].

    A patch (pool 1) sits at its own index, so patches and cells share one coordinate system.
    """
    axis = torch.arange(grid // pool, dtype=torch.float32) * pool + (pool - 1) / 2
    return torch.cartesian_prod(axis, axis)


def sincos(points: Tensor, dim: int) -> Tensor:
    """Embed points [T, 2] as [T, dim]: a half each for column and row, sines then cosines (MAE, He et al. 2022, A.1)."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    halves = [torch.outer(points[:, axis].double(), frequencies) for axis in (1, 0)]
    return torch.cat([f(angle) for angle in halves for f in (torch.sin, torch.cos)], dim=1).float()
