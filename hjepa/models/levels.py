"""Levels: the hierarchy of targets, from fine to coarse.

The target of a level is the teacher's output at one of its layers, averaged over cells of `pool` x `pool` patches and
normalized per token without learned affine parameters. No learned parameter touches a target. With `summary`, a second pass of
the predictor sees the summary tokens of the student only and must predict the targets of the first level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeFloat, NonNegativeInt, PositiveFraction, PositiveInt
from hjepa.models.encoder import Stage
from hjepa.models.layers import gather_tokens


@dataclass(frozen=True)
class Levels:
    """The hierarchy, one entry per level in each list. Without levels, nothing is predicted (`levels=none`).

    Args:
        depth: Layer of the encoder as a fraction of their number; 1.0 is the last layer (after the final norm).
        pool: Side of a target cell in patches. Each entry divides the largest one and the side of the patch grid.
        weight: Factor of the loss of the level.
        summary: Factor of the loss of the summary pass; 0 omits the pass.
        summary_tokens: Number of summary tokens of the encoder.
        upper: Constructor of a level stacked on these (see `hjepa.models.stacked.StackedLevel`), or None.
        fusion: How the predictor combines the stages of the student at the layers of the levels (see `Fusion`).
    """

    depth: list[PositiveFraction]
    pool: list[PositiveInt]
    weight: list[NonNegativeFloat]
    summary: NonNegativeFloat = 0.0
    summary_tokens: NonNegativeInt = 0
    fusion: Literal["none", "add", "concat"] = "none"
    upper: Any = None

    def __post_init__(self) -> None:
        if not len(self.depth) == len(self.pool) == len(self.weight) <= 4:
            raise UserError(
                f"levels.depth={list(self.depth)}, levels.pool={list(self.pool)} and levels.weight={list(self.weight)} "
                "need one entry per level each, for at most 4 levels."
            )
        if any(max(self.pool) % p for p in self.pool):
            raise UserError(f"levels.pool={list(self.pool)}: each entry must divide the largest one, as in [1, 2, 4].")
        if self.upper and not self.pool:
            raise UserError("levels.upper needs a level below it; set levels.depth, levels.pool and levels.weight to one entry.")
        if self.summary and not (self.summary_tokens and self.pool):
            raise UserError(
                f"levels.summary={self.summary} needs summary tokens and a level to predict, but levels.summary_tokens="
                f"{self.summary_tokens} and the number of levels is {len(self.pool)}; set levels.summary_tokens to 1 or more."
            )

    def check_grid(self, grid: int) -> None:
        """Raise `UserError` if the cells do not divide a grid of patches, or leave fewer than 2x2 cells of the largest size."""
        largest = max(self.pool, default=1)
        if grid % largest or grid // largest < 2:
            raise UserError(
                f"levels.pool={list(self.pool)} does not fit a grid of {grid}x{grid} patches: every pool must divide "
                f"{grid} and leave at least 2x2 cells; use smaller pools, smaller patches or larger images."
            )

    def names(self) -> list[str]:
        """Return short names for metrics, beginning with `level1`."""
        return [f"level{i}" for i in range(1, len(self.pool) + 1)]

    def layers(self, num_layers: int) -> list[int]:
        """Return the layer of every level in an encoder with `num_layers` layers, in 1..num_layers."""
        return [max(1, round(fraction * num_layers)) for fraction in self.depth]

    def targets(
        self, stages: dict[int, Stage], masks: Sequence[Int[Tensor, "b c _ _"]], grid: int, num_layers: int
    ) -> list[Float[Tensor, "b c _ _ _"]]:
        """Compute the targets of every level.

        Args:
            stages: Stages of the teacher over the whole images, by layer.
            masks: Indices [B, C, P, T] into the cells of each level.
            grid: Side of the grid of patches.
            num_layers: Number of layers of the encoder.

        Returns:
            Targets [B, C, P, T, D] of every level, layer-normalized without affine parameters.
        """
        result = []
        for layer, pool, index in zip(self.layers(num_layers), self.pool, masks, strict=True):
            stage = stages[layer]
            cells = gather_tokens(pool_cells(stage.cells, stage.grid, stage.grid * pool // grid), index)
            result.append(F.layer_norm(cells.float(), cells.shape[-1:]))
        return result


def pool_cells(tokens: Float[Tensor, "b n d"], grid: int, pool: int) -> Float[Tensor, "b m d"]:
    """Average tokens over `pool` x `pool` cells of a grid: [B, grid^2, D] -> [B, (grid/pool)^2, D]."""
    if pool == 1:
        return tokens
    side = grid // pool
    return tokens.unflatten(1, (side, pool, side, pool)).mean((2, 4)).flatten(1, 2)
