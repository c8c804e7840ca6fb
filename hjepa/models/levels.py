"""Levels: what the student has to predict, from fine to coarse.

A level is (depth, pool, weight): the teacher's hidden state at `depth`, mean-pooled 2-D over `pool` x `pool` cells of the
patch grid and layer-normalized without learned affine. No learned parameter touches a target. `summary` adds an abstract
level: a second predictor pass that sees only the student's summary tokens and must predict the first level's targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.models.layers import gather_tokens


@dataclass(frozen=True)
class Levels:
    """The hierarchy, one entry per level in each list; without any, nothing is predicted (`levels=none`).

    Args:
        depth: fraction of the encoder's blocks, 0 < depth <= 1; 1.0 is the last block (after the final norm).
        pool: side of a target cell in patches; each divides the next coarser one and the patch grid's side.
        weight: factor of the level's loss.
        summary: factor of the summary pass' loss; 0 leaves the pass out.
        summary_tokens: how many summary tokens the encoder carries.
        upper: the constructor of a level stacked on these (see `hjepa.models.stacked.StackedLevel`), None for none.
        fusion: how the student's hidden states at the levels' depths are brought together for the predictor (see `Fusion`).
    """

    depth: list[float]
    pool: list[int]
    weight: list[float]
    summary: float = 0.0
    summary_tokens: int = 0
    fusion: Literal["none", "add", "concat"] = "none"
    upper: Any = None

    def __post_init__(self) -> None:
        if not len(self.depth) == len(self.pool) == len(self.weight) <= 4:
            raise UserError(
                f"levels.depth={list(self.depth)}, levels.pool={list(self.pool)} and levels.weight={list(self.weight)} "
                "need one entry per level each, for at most 4 levels."
            )
        if not all(0 < d <= 1 for d in self.depth):
            raise UserError(f"levels.depth={list(self.depth)}: each is a fraction of the encoder's blocks in (0, 1].")
        if any(p < 1 or max(self.pool) % p for p in self.pool):
            raise UserError(f"levels.pool={list(self.pool)}: each must divide the coarsest, e.g. [1, 2, 4].")
        if min([*self.weight, self.summary]) < 0:
            raise UserError(f"levels.weight={list(self.weight)} and levels.summary={self.summary} must not be negative.")
        if self.upper and not self.pool:
            raise UserError("levels.upper needs a level to stand on; give levels.depth, pool and weight one entry.")
        if self.summary and not (self.summary_tokens and self.pool):
            raise UserError(
                f"levels.summary={self.summary} needs levels.summary_tokens of at least 1 and a level to predict; there are "
                f"{self.summary_tokens} tokens and {len(self.pool)} levels."
            )

    def check_grid(self, grid: int) -> None:
        """Refuse cells that the grid cannot be cut into, or a coarsest grid under 2 x 2."""
        coarsest = max(self.pool, default=1)
        if grid % coarsest or grid // coarsest < 2:
            raise UserError(
                f"levels.pool={list(self.pool)} does not fit a grid of {grid}x{grid} patches: every pool must divide "
                f"{grid} and leave at least 2x2 cells; use smaller pools, smaller patches or larger images."
            )

    def names(self) -> list[str]:
        """Short names for metrics, `level1` the first."""
        return [f"level{i}" for i in range(1, len(self.pool) + 1)]

    def block_counts(self, encoder_depth: int) -> list[int]:
        """The encoder's block count of every level, at least 1."""
        return [max(1, round(fraction * encoder_depth)) for fraction in self.depth]

    def targets(self, states: dict[int, Tensor], masks: Sequence[Tensor], grid: int, encoder_depth: int) -> list[Tensor]:
        """The target of every level.

        Args:
            states: teacher's hidden states of the patches, [B, N, D] by block count.
            masks: per level int64 [B, C, P, T_l], indices into the level's grid.

        Returns:
            Per level [B, C, P, T_l, D], each vector layer-normalized without affine.
        """
        result = []
        for count, pool, index in zip(self.block_counts(encoder_depth), self.pool, masks, strict=True):
            cells = gather_tokens(pool_cells(states[count], grid, pool), index)
            result.append(F.layer_norm(cells.float(), cells.shape[-1:]))
        return result


def pool_cells(tokens: Tensor, grid: int, pool: int) -> Tensor:
    """Mean over `pool` x `pool` patches of the grid: [B, grid^2, D] -> [B, (grid/pool)^2, D]."""
    if pool == 1:
        return tokens
    side = grid // pool
    return tokens.unflatten(1, (side, pool, side, pool)).mean((2, 4)).flatten(1, 2)
