"""Stacked levels: a level with an encoder of its own over the representation of the level below, its own teacher, predictor
and (larger) masks. The level below is seen whole, mean-pooled to 2-D cells; the upper student encodes some of the cells and
predicts what the upper teacher says about others, exactly as below.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from timm.models.vision_transformer import Block
from torch import Generator, Tensor, nn
from torch.nn.functional import layer_norm

from hjepa.config.errors import UserError
from hjepa.masking import Masks, MaskSampler
from hjepa.models.layers import LeanMlp, Recomputing, gather_tokens, grid_centers, init_xavier, sincos_positions
from hjepa.models.levels import pool_cells
from hjepa.models.predictor import Predictor


class CellEncoder(Recomputing):
    """A small transformer over the cells of a grid.

    Args:
        input_dim: width of the cells; grid: cells to a side; dim, depth, heads: of the transformer.
    """

    def __init__(self, input_dim: int, grid: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_dim, dim)
        self.register_buffer("positions", sincos_positions(grid_centers(grid), dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True, mlp_layer=LeanMlp) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.apply(init_xavier)

    def forward(self, cells: Tensor, keep: Tensor | None = None) -> Tensor:
        """cells [B, n, input_dim], all of them or the kept ones int64 [B, C, K] -> [B*C, K, dim]."""
        x = self.embed(cells) + self.positions
        if keep is not None:
            x = gather_tokens(x, keep).flatten(0, 1)
        for block in self.blocks:
            x = self.run(block, x)
        normed: Tensor = self.norm(x)
        return normed


class StackedLevel(nn.Module):
    """The level above another one.

    Args:
        input_dim, grid: width of the tokens below and side of their grid.
        pool: side of a cell, in tokens of the level below; dim, depth, heads: of its encoder.
        predictor, masking: constructors that lack the sizes.
        weight: factor of its loss.
        detach: its student sees the teacher below and leaves the student below alone; otherwise it sees the student below,
            which then encodes the whole image too and is trained from above.
        upper: the constructor of the next level, None for none.
    """

    def __init__(
        self,
        input_dim: int,
        grid: int,
        pool: int,
        dim: int,
        depth: int,
        heads: int,
        predictor: Callable[..., Predictor],
        masking: Callable[..., MaskSampler],
        weight: float,
        detach: bool,
        upper: Callable[..., "StackedLevel"] | None,
    ) -> None:
        super().__init__()
        if pool < 1 or grid % pool or grid // pool < 4:
            raise UserError(f"levels.upper.pool={pool} does not cut a {grid}x{grid} grid into at least 4x4 cells; use a divisor.")
        if dim % heads or dim % 4 or weight < 0:
            raise UserError(
                f"levels.upper needs a dim={dim} that 4 and heads={heads} divide, and a weight={weight} of 0 or more."
            )
        self.grid, self.side, self.pool, self.weight, self.detach = grid, grid // pool, pool, weight, detach
        self.student = CellEncoder(input_dim, self.side, dim, depth, heads)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.predictor = predictor(encoder_dim=dim, grid=self.side, pools=[1])
        self.sampler = masking(grid=self.side, pools=[1])
        self.upper = upper(input_dim=dim, grid=self.side) if upper else None

    def forward(
        self, teacher: Tensor, student: Callable[[], Tensor], masks: tuple[Masks, ...]
    ) -> list[tuple[float, Tensor, Tensor]]:
        """Weight, prediction and target [B, C, P, T, dim] of this level and of those above.

        Args:
            teacher: the level below as its teacher has it, [B, N, input_dim].
            student: computes the same from the student below; called unless `detach`.
            masks: of this level and of those above.
        """
        mask, *above = masks
        below = pool_cells(teacher, self.grid, self.pool)
        seen = below.detach() if self.detach else pool_cells(student(), self.grid, self.pool)
        with torch.set_grad_enabled(self.teacher is self.student and torch.is_grad_enabled()):
            told = self.teacher(below)
            cells = gather_tokens(told, mask.targets[0])
            target = layer_norm(cells.float(), cells.shape[-1:])
        prediction = self.predictor(self.student(seen, mask.context), mask.context, mask.targets)[0]
        levels = [(self.weight, prediction, target)]
        return levels + (self.upper(told, lambda: self.student(seen), tuple(above)) if self.upper else [])

    def share_teacher(self) -> None:
        """Let every student from here upwards be its own teacher."""
        self.teacher = self.student
        if self.upper:
            self.upper.share_teacher()

    def stacked_levels(self) -> list["StackedLevel"]:
        """This level and those above."""
        return [self, *(self.upper.stacked_levels() if self.upper else [])]


class StackedMaskSampler:
    """Masks of the image's levels, and beside them those of every stacked level."""

    def __init__(self, sampler: MaskSampler, stacked_levels: list[StackedLevel]) -> None:
        self.sampler, self.samplers = sampler, [stage.sampler for stage in stacked_levels]

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        masks = self.sampler(batch_size, generator)
        return Masks(masks.context, masks.targets, tuple(sampler(batch_size, generator) for sampler in self.samplers))
