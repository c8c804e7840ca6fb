"""Mask samplers with one large context block and several target blocks."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Generator, Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import FractionRange, PositiveInt, PositiveRange
from hjepa.masking.base import Masks, MaskSampler
from hjepa.masking.geometry import (
    block_size,
    blocks_to_cells,
    indices_to_mask,
    largest_block_area,
    sample_blocks,
    sample_log_uniform,
    sample_uniform,
    top_indices,
)


class BlockMaskSampler(MaskSampler):
    """Base class of samplers with one large context block minus several target blocks.

    Args:
        grid: See `MaskSampler`.
        pools: See `MaskSampler`.
        target_aspect: Range of height / width of the target blocks.
        context_scale: Range of the context block's fraction of the patches.
        max_covered: Largest number of patches that the target blocks can cover together.
    """

    def __init__(
        self, grid: int, pools: Sequence[int], target_aspect: list[float], context_scale: list[float], max_covered: int
    ) -> None:
        super().__init__(grid, pools)
        self.target_aspect, self.context_scale = target_aspect, context_scale
        self.min_context = self.num_patches - max_covered
        if self.min_context < 1:
            raise UserError(
                f"The target blocks can cover all {self.num_patches} patches of the {grid}x{grid} grid ({max_covered} patches "
                "without overlap) and leave no context; use fewer or smaller target blocks, smaller patches or larger images."
            )

    def sample_targets(
        self, shape: tuple[int, int, int], scale: Sequence[float], multiple: int, generator: Generator
    ) -> tuple[Int64[Tensor, "b c p n"], tuple[int, int]]:
        """Sample [B, C, P] target blocks of one size; return their patches and the height and width of a block."""
        area = sample_uniform(scale, generator) * self.num_patches
        aspect = sample_log_uniform(self.target_aspect, generator)
        size = block_size(area, aspect, self.grid, multiple, scale[1] * self.num_patches)
        return sample_blocks(shape, size, self.grid, multiple, generator), size

    def sample_context(self, covered: Bool[Tensor, "b n"], generator: Generator) -> Int64[Tensor, "b 1 k"]:
        """Sample a context block and return a random choice of its patches that are not covered by targets.

        All images get as many patches as the image with the fewest candidates has, but at least `min_context`. Images with
        fewer candidates fall back on patches outside the block, so that one image does not starve the batch.
        """
        size = block_size(sample_uniform(self.context_scale, generator) * self.num_patches, 1.0, self.grid)
        block = indices_to_mask(sample_blocks((len(covered),), size, self.grid, 1, generator), self.num_patches)
        candidates = block & ~covered
        count = max(self.min_context, int(candidates.sum(1).min()))
        scores = torch.rand(covered.shape, generator=generator) + candidates.float() - 2 * covered.float()
        return top_indices(scores, count).unsqueeze(1)


class MultiblockMasking(BlockMaskSampler):
    """Multi-block masking of I-JEPA (Assran et al. 2023): one large context block minus several target blocks.

    As in I-JEPA, the size of the blocks is sampled once per batch and their positions per image. Unlike in I-JEPA, contexts
    are cut to the batch's common size by a random choice instead of dropping the last rows. If levels pool, the blocks lie on
    the coarsest level's cells and every level predicts the same regions.

    Args:
        grid: See `MaskSampler`.
        pools: See `MaskSampler`.
        target_scale: Range of a target block's fraction of the patches, cut where all blocks together could cover the image.
        target_aspect: Range of height / width of the target blocks.
        context_scale: Range of the context block's fraction of the patches.
        blocks: Number of target blocks per image.
    """

    def __init__(
        self,
        grid: int,
        pools: Sequence[int],
        target_scale: FractionRange,
        target_aspect: PositiveRange,
        context_scale: FractionRange,
        blocks: PositiveInt,
    ) -> None:
        pool = max(pools, default=1)
        largest = (1 - pool**2 / grid**2) / blocks  # leaves a cell for the context, wherever the blocks lie
        self.target_scale = [target_scale[0], max(target_scale[0], min(target_scale[1], largest))]
        self.num_blocks = blocks
        area = largest_block_area(self.target_scale[1], target_aspect, grid, pool)
        super().__init__(grid, pools, target_aspect, context_scale, max_covered=blocks * area)

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        shape = (batch_size, 1, self.num_blocks)
        blocks, size = self.sample_targets(shape, self.target_scale, self.coarsest_pool, generator)
        context = self.sample_context(indices_to_mask(blocks, self.num_patches), generator)
        return Masks(context, tuple(blocks_to_cells(blocks, size, self.grid, pool) for pool in self.pools))


class HierarchicalMasking(BlockMaskSampler):
    """Multi-block masking with a separate block size for each level: coarser levels predict larger regions.

    Args:
        grid: See `MaskSampler`.
        pools: See `MaskSampler`.
        target_scale: For each level, the range of a target block's fraction of the patches; the last entry serves all
            further levels.
        target_aspect: Range of height / width of the target blocks.
        context_scale: Range of the context block's fraction of the patches.
        blocks: For each level, the number of target blocks per image; the last entry serves all further levels.
    """

    def __init__(
        self,
        grid: int,
        pools: Sequence[int],
        target_scale: list[FractionRange],
        target_aspect: PositiveRange,
        context_scale: FractionRange,
        blocks: list[PositiveInt],
    ) -> None:
        if not target_scale or not blocks:
            raise UserError(f"masking.target_scale={target_scale} and masking.blocks={blocks} need an entry per level.")
        self.block_pools = list(pools) or [1]  # without levels, blocks of patches are hidden
        self.target_scales = [target_scale[min(i, len(target_scale) - 1)] for i in range(len(self.block_pools))]
        self.num_blocks = [blocks[min(i, len(blocks) - 1)] for i in range(len(self.block_pools))]
        scales = zip(self.target_scales, self.block_pools, strict=True)
        areas = [largest_block_area(scale[1], target_aspect, grid, pool) for scale, pool in scales]
        max_covered = sum(count * area for count, area in zip(self.num_blocks, areas, strict=True))
        super().__init__(grid, pools, target_aspect, context_scale, max_covered)

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        targets, covered = [], torch.zeros(batch_size, self.num_patches, dtype=torch.bool)
        for pool, scale, count in zip(self.block_pools, self.target_scales, self.num_blocks, strict=True):
            blocks, size = self.sample_targets((batch_size, 1, count), scale, pool, generator)
            targets.append(blocks_to_cells(blocks, size, self.grid, pool))
            covered |= indices_to_mask(blocks, self.num_patches)
        return Masks(self.sample_context(covered, generator), tuple(targets[: len(self.pools)]))
