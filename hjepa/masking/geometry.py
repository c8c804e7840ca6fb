"""Geometry of masks: blocks of patches on a square grid, and the cells of the pooled grids that they cover.

All indices count in raster order. A grid of `grid` x `grid` patches, pooled by `pool`, has `(grid / pool)^2` cells.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Generator, Tensor


def block_size(area: float, aspect: float, grid: int, multiple: int = 1, max_area: float = math.inf) -> tuple[int, int]:
    """Return the height and width in patches of a block of about `area` patches (I-JEPA, Assran et al. 2023).

    Args:
        area: Area of the block in patches.
        aspect: Height divided by width.
        grid: Side of the grid in patches; neither side of the block is longer.
        multiple: Both sides are multiples of this number of patches, and at least this long.
        max_area: Largest area in patches. It is exceeded only where the lowest block that is allowed is already larger.
    """
    cells = grid // multiple
    height = min(cells, max(1, round(math.sqrt(area * aspect) / multiple)))
    column_area = height * multiple * multiple  # of a block that is one cell wide
    width = min(cells, max(1, min(round(area / column_area), int(min(max_area, grid * grid) // column_area))))
    return height * multiple, width * multiple


def largest_block_area(scale: float, aspect: Sequence[float], grid: int, multiple: int) -> int:
    """Return an upper bound in patches for the blocks that a sampler can produce.

    The bound is the maximum over a dense set of areas and aspects.

    Args:
        scale: Largest fraction of the patches.
        aspect: Range [smallest, largest] of height / width.
        grid: Side of the grid in patches.
        multiple: See `block_size`.
    """
    steps = 4 * grid + 1
    low, high = math.log(aspect[0]), math.log(min(aspect[1], 1e6))
    aspects = [math.exp(low + (high - low) * i / (steps - 1)) for i in range(steps)]
    areas = [i * scale * grid * grid / 32 for i in range(1, 33)]
    return max(math.prod(block_size(area, a, grid, multiple, areas[-1])) for a in aspects for area in areas)


def sample_blocks(
    shape: tuple[int, ...], size: tuple[int, int], grid: int, multiple: int, generator: Generator
) -> Int64[Tensor, "*shape n"]:
    """Sample uniform positions of blocks and return their patches, `n = height * width` for each.

    Args:
        shape: Shape of the array of blocks.
        size: Height and width of every block in patches.
        grid: Side of the grid in patches.
        multiple: The corners of the blocks lie on multiples of this number of patches.
        generator: Source of randomness.
    """
    height, width = size
    top = torch.randint((grid - height) // multiple + 1, (*shape, 1, 1), generator=generator) * multiple
    left = torch.randint((grid - width) // multiple + 1, (*shape, 1, 1), generator=generator) * multiple
    rows = top + torch.arange(height).unsqueeze(-1)
    return (rows * grid + left + torch.arange(width)).flatten(-2)


def patches_to_cells(patches: Int64[Tensor, "*shape n"], grid: int, pool: int) -> Int64[Tensor, "*shape n"]:
    """Return for every patch the cell that contains it."""
    return patches // grid // pool * (grid // pool) + patches % grid // pool


def blocks_to_cells(blocks: Int64[Tensor, "*shape n"], size: tuple[int, int], grid: int, pool: int) -> Int64[Tensor, "*shape t"]:
    """Return the cells inside blocks whose corners and sides are multiples of `pool`, `t = n / pool^2` for each block."""
    corners = blocks.unflatten(-1, size)[..., ::pool, ::pool].flatten(-2)
    return patches_to_cells(corners, grid, pool)


def cells_to_patches(cells: Int64[Tensor, "*shape t"], grid: int, pool: int) -> Int64[Tensor, "*shape n"]:
    """Return the patches inside cells, `n = t * pool^2`, cell by cell."""
    side = grid // pool
    corner = (cells // side) * pool * grid + (cells % side) * pool
    axis = torch.arange(pool, device=cells.device)
    inside = (axis.unsqueeze(1) * grid + axis).flatten()
    return (corner.unsqueeze(-1) + inside).flatten(-2)


def indices_to_mask(indices: Int64[Tensor, "b ..."], size: int) -> Bool[Tensor, "b n"]:
    """Return masks of `n = size` entries that are true at the indices of each row."""
    mask = torch.zeros(len(indices), size, dtype=torch.bool)
    return mask.scatter_(1, indices.flatten(1), True)


def top_indices(scores: Float[Tensor, "*shape n"], count: int) -> Int64[Tensor, "*shape k"]:
    """Return the sorted indices of the `k = count` highest scores along the last dimension."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def sample_uniform(low_high: Sequence[float], generator: Generator) -> float:
    """Sample a number uniformly from [low, high]."""
    low, high = low_high
    return low + (high - low) * torch.rand((), generator=generator).item()


def sample_log_uniform(low_high: Sequence[float], generator: Generator) -> float:
    """Sample a number whose logarithm is uniform, as is usual for ratios."""
    return math.exp(sample_uniform([math.log(value) for value in low_high], generator))
