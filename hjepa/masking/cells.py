"""Mask samplers that divide the cells of the coarsest level between context and targets."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Generator, Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import FractionRange, OpenFraction, PositiveInt, PositiveRange
from hjepa.masking.base import Masks, MaskSampler
from hjepa.masking.geometry import (
    block_size,
    cells_to_patches,
    indices_to_mask,
    largest_block_area,
    patches_to_cells,
    sample_blocks,
    sample_log_uniform,
    sample_uniform,
    top_indices,
)


class CellMaskSampler(MaskSampler):
    """Base class of samplers that choose among the coarsest level's cells, so that any choice suits every level.

    Attributes:
        num_cells: Number of cells of the coarsest level.
    """

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        super().__init__(grid, pools)
        self.num_cells = (grid // self.coarsest_pool) ** 2

    def build_masks(self, context: Int64[Tensor, "b c k"], targets: Int64[Tensor, "b c t"]) -> Masks:
        """Convert cells of the coarsest level to masks for all levels.

        Args:
            context: Visible cells.
            targets: Cells to predict; they form one block per context.
        """
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
