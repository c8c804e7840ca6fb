"""Mask samplers: which patches the student sees, and which cells of every level it has to predict.

The trainer builds one sampler for the patch grid and the levels' pools, and calls it once per batch as
`sampler(batch_size, generator) -> Masks`. The masks then select the student's input in the encoder, and the queries and
targets in the predictor. Every sampler keeps to this contract:

- All images of a batch have equally many context patches and targets, so that there is no padding.
- Context and targets are disjoint, and indices are sorted.
- The cells of a pooled level contain target patches only.
- Sampling is vectorized over the batch, never retries, and runs on the CPU from the generator that is passed.

To add a strategy, write a subclass of `MaskSampler` (or of `CellMaskSampler`) and a file in conf/masking/ that names it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Generator, Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import FractionRange, OpenFraction, PositiveInt, PositiveRange
from hjepa.masking.geometry import (
    block_size,
    blocks_to_cells,
    cells_to_patches,
    indices_to_mask,
    largest_block_area,
    patches_to_cells,
    sample_blocks,
    sample_log_uniform,
    sample_uniform,
    top_indices,
)


@dataclass(frozen=True)
class Masks:
    """Indices of the visible patches and of the cells to predict, for B images with C contexts each.

    Attributes:
        context: Visible patches, K per context.
        targets: For each level, the cells of P target blocks per context, [B, C, P, T]; P and T differ between levels.
        stacked: Masks of the stacked levels, on their own grids.
    """

    context: Int64[Tensor, "b c k"]
    targets: tuple[Int64[Tensor, "b c _ _"], ...]
    stacked: tuple["Masks", ...] = ()

    def to(self, device: torch.device) -> "Masks":
        """Return the masks on a device."""
        targets = tuple(target.to(device, non_blocking=True) for target in self.targets)
        return Masks(self.context.to(device, non_blocking=True), targets, tuple(masks.to(device) for masks in self.stacked))

    def select(self, rows: Int64[Tensor, " n"]) -> "Masks":
        """Return the masks of some images of the batch."""
        targets = tuple(target[rows] for target in self.targets)
        return Masks(self.context[rows], targets, tuple(masks.select(rows) for masks in self.stacked))

    def split(self, num_chunks: int) -> list["Masks"]:
        """Split the batch into consecutive chunks of equal size."""
        targets = list(zip(*(target.chunk(num_chunks) for target in self.targets), strict=True)) or [()] * num_chunks
        stacked = list(zip(*(masks.split(num_chunks) for masks in self.stacked), strict=True)) or [()] * num_chunks
        return [Masks(*chunk) for chunk in zip(self.context.chunk(num_chunks), targets, stacked, strict=True)]


class MaskSampler(ABC):
    """Base class of all mask samplers.

    Args:
        grid: Side of the patch grid.
        pools: For each level, the side of its cells in patches.

    Attributes:
        num_patches: Number of patches of an image.
        coarsest_pool: Side of the coarsest level's cells in patches.
        num_contexts: Number of contexts per image, the C of the masks.
        hides_patches: False if every context is the whole image.
    """

    num_contexts = 1
    hides_patches = True

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        self.grid, self.pools, self.num_patches = grid, tuple(pools), grid * grid
        self.coarsest_pool = max(self.pools, default=1)

    @abstractmethod
    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        """Sample masks for a batch."""


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
        self.target_scales = [target_scale[min(i, len(target_scale) - 1)] for i in range(len(pools))]
        self.num_blocks = [blocks[min(i, len(blocks) - 1)] for i in range(len(pools))]
        areas = [largest_block_area(s[1], target_aspect, grid, p) for s, p in zip(self.target_scales, pools, strict=True)]
        max_covered = sum(count * area for count, area in zip(self.num_blocks, areas, strict=True))
        super().__init__(grid, pools, target_aspect, context_scale, max_covered)

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        targets, covered = [], torch.zeros(batch_size, self.num_patches, dtype=torch.bool)
        for pool, scale, count in zip(self.pools, self.target_scales, self.num_blocks, strict=True):
            blocks, size = self.sample_targets((batch_size, 1, count), scale, pool, generator)
            targets.append(blocks_to_cells(blocks, size, self.grid, pool))
            covered |= indices_to_mask(blocks, self.num_patches)
        return Masks(self.sample_context(covered, generator), tuple(targets))


class CellMaskSampler(MaskSampler):
    """Base class of samplers that choose among the coarsest level's cells, so that any choice suits every level.

    Attributes:
        num_cells: Number of cells of the coarsest level.
    """

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        super().__init__(grid, pools)
        self.num_cells = (grid // self.coarsest_pool) ** 2

    def build_masks(self, context: Int64[Tensor, "b c k"], targets: Int64[Tensor, "b c t"]) -> Masks:
        """Return the masks for a choice of coarsest cells, with one target block per context."""
        patches = cells_to_patches(targets, self.grid, self.coarsest_pool).sort(-1).values
        levels = []
        for pool in self.pools:
            is_corner = (patches // self.grid % pool == 0) & (patches % self.grid % pool == 0)
            corners = patches[is_corner].view(*patches.shape[:2], 1, -1)
            levels.append(patches_to_cells(corners, self.grid, pool))
        return Masks(cells_to_patches(context, self.grid, self.coarsest_pool).sort(-1).values, tuple(levels))


class RandomMasking(CellMaskSampler):
    """Uniformly random targets; everything else is context (the masking of MAE, He et al. 2022).

    Args:
        grid: See `MaskSampler`.
        pools: See `MaskSampler`.
        target_share: Fraction of the cells that is predicted.
        contexts: Number of independent masks per image; they share the teacher's forward pass.
    """

    def __init__(self, grid: int, pools: Sequence[int], target_share: OpenFraction, contexts: PositiveInt) -> None:
        super().__init__(grid, pools)
        self.num_targets, self.num_contexts = round(target_share * self.num_cells), contexts
        if not 0 < self.num_targets < self.num_cells:
            raise UserError(
                f"masking.target_share={target_share} of {self.num_cells} cells must leave at least one cell to see and one to "
                "predict; use another share, smaller patches or larger images."
            )

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        order = torch.rand(batch_size, self.num_contexts, self.num_cells, generator=generator).argsort(-1)
        return self.build_masks(order[..., self.num_targets :], order[..., : self.num_targets])


class InverseBlockMasking(CellMaskSampler):
    """Inverse block masking (data2vec 2.0, Baevski et al. 2022): one contiguous context block; the rest is predicted.

    Args:
        grid: See `MaskSampler`.
        pools: See `MaskSampler`.
        context_scale: Range of the context block's fraction of the patches.
        context_aspect: Range of height / width of the context block.
        contexts: Number of context blocks per image; they share the teacher's forward pass.
    """

    def __init__(
        self,
        grid: int,
        pools: Sequence[int],
        context_scale: FractionRange,
        context_aspect: PositiveRange,
        contexts: PositiveInt,
    ) -> None:
        super().__init__(grid, pools)
        self.side = grid // self.coarsest_pool
        if largest_block_area(context_scale[1], context_aspect, self.side, 1) >= self.num_cells:
            raise UserError(
                f"masking.context_scale={list(context_scale)} can cover the whole {grid}x{grid} grid and leave nothing to "
                "predict; use a smaller share, smaller patches or larger images."
            )
        self.context_scale, self.context_aspect, self.num_contexts = context_scale, context_aspect, contexts

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        area = sample_uniform(self.context_scale, generator) * self.num_cells
        aspect = sample_log_uniform(self.context_aspect, generator)
        size = block_size(area, aspect, self.side, max_area=self.context_scale[1] * self.num_cells)
        context = sample_blocks((batch_size, self.num_contexts), size, self.side, 1, generator)
        visible = indices_to_mask(context.flatten(0, 1), self.num_cells).view(*context.shape[:2], -1)
        return self.build_masks(context, top_indices(-visible.float(), self.num_cells - context.shape[-1]))


class PartitionMasking(CellMaskSampler):
    """Partition of Parallel JEPA: cells are shuffled into equal parts, and each part alone predicts all others.

    Args:
        grid: See `MaskSampler`.
        pools: See `MaskSampler`.
        num_parts: Number of parts per image; each is a context.
    """

    def __init__(self, grid: int, pools: Sequence[int], num_parts: int) -> None:
        super().__init__(grid, pools)
        if num_parts < 2 or self.num_cells % num_parts:
            raise UserError(
                f"masking.num_parts={num_parts} does not divide the {self.num_cells} cells of the coarsest level into at least "
                "two equal parts; use a divisor."
            )
        self.num_contexts = num_parts

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        order = torch.rand(batch_size, self.num_cells, generator=generator).argsort(-1)
        parts = order.view(batch_size, self.num_contexts, -1)
        numbers = range(self.num_contexts)
        others = [torch.cat([parts[:, j] for j in numbers if j != i], dim=1) for i in numbers]
        return self.build_masks(parts, torch.stack(others, dim=1))


class NoMasking(CellMaskSampler):
    """The student sees every patch; for levels whose targets lie in other views, and for `levels=none`."""

    hides_patches = False

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        super().__init__(grid, pools)
        if pools:
            raise UserError(
                "masking=none hides nothing that levels.view=[same] could predict; choose another masking, levels=views or "
                "levels=none."
            )

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        return Masks(torch.arange(self.num_patches).expand(batch_size, 1, -1), ())
