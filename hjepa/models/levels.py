"""Levels: the hierarchy of targets.

The target of a level is the teacher's output at one stage of the encoder, averaged over cells of that stage or over the whole
image. A level predicts cells that are hidden from the student in the same view of the image (I-JEPA, Assran et al. 2023), or
cells of another view, whose place in the context's view follows from the geometry of the crops (as in VICRegL, Bardes et al.
2022). Predictions and targets are compared after a projector, or in the space of the encoder; there, targets are normalized per
token without learned affine parameters. With `summary`, a second pass of the predictor sees the summary tokens of the student
only and must predict the targets of the first level.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from hjepa.masking.geometry import cells_to_patches
from hjepa.models.encoder import Encoder, Stage

MAX_LEVELS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Level:
    """A level of an encoder.

    Attributes:
        name: Name in metrics, beginning with `level1`.
        layer: Layer of the encoder that gives the targets.
        pool: Side of a target cell in cells of that layer; None for the whole image.
        grid: Side of the grid of target cells; 1 for the whole image.
        dim: Width of a target before a projector.
        weight: Factor of the loss.
        other: True if the targets lie in other views, False if they are hidden cells of the context's own view.
        project: True if predictions and targets are compared after a projector.
        match: True if `MatchingPredictor` predicts the level, False if `Predictor` does.
        slot: Index of the level among the levels that the same predictor serves.
        mask_pool: Side in patches of the cells that the mask sampler selects for this level, at least 1.
        refine: Number of target cells along a side of a sampled cell. It is larger than 1 if the layer has a finer grid than the
            patches.
    """

    name: str
    layer: int
    pool: int | None
    grid: int
    dim: int
    weight: float = 1.0
    other: bool = False
    project: bool = False
    match: bool = False
    slot: int = 0
    mask_pool: int = 1
    refine: int = 1

    def cells(self, stage: Stage) -> Float[Tensor, "b n d"]:
        """Return the cells of the level in a stage over whole images or crops of any size, in raster order."""
        if self.pool is None:
            return Encoder.pool_tokens(stage).unsqueeze(1)
        return pool_cells(stage.cells, stage.grid, min(self.pool, stage.grid))

    def target_cells(self, sampled: Int64[Tensor, "b c p _"]) -> Int64[Tensor, "b c p t"]:
        """Return the target cells from the cells that a mask sampler chose; see `refine`."""
        return cells_to_patches(sampled, self.grid, self.refine) if self.refine > 1 else sampled

    def side(self, patches: int, all_patches: int) -> int:
        """Return the number of cells along a side of a crop.

        Args:
            patches: Number of patches along a side of the crop.
            all_patches: Number of patches along a side of an image of the full size.
        """
        return max(1, self.grid * patches // all_patches)


@dataclass(frozen=True)
class Levels:
    """The hierarchy, one entry per level in each list. Without levels, nothing is predicted (`levels=none`).

    Args:
        stage: Layer of the encoder: its number from 1, or from the end if negative (-1 is the last layer, after the final norm),
            or a fraction of the number of layers, as 0.5 for the one in the middle.
        pool: Side of a target cell in cells of that layer, or "whole" for the whole image.
        weight: Factor of the loss of the level.
        view: Where the targets lie: "same" (hidden cells of the context's own view) or "other" (other views of the image).
            One entry serves all levels.
        project: Whether predictions and targets are compared after a projector (see the group `projector`), as contrastive
            losses need. One entry serves all levels.
        predictor: What predicts the level: "attention" (`model.predictor`) or "matching" (see `matching`). One entry serves all
            levels.
        matching: Constructor of the predictor that reads the student's output at the place of the target (see
            `MatchingPredictor`).
        loss: Prediction losses of single levels by name (`level1`, ...); the others use the group `loss`.
        summary: Factor of the loss of the summary pass; 0 omits the pass.
        summary_tokens: Number of summary tokens of the encoder.
        upper: Constructor of a level stacked on these (see `hjepa.models.stacked.StackedLevel`), or None.
        fusion: How the predictor combines the stages of the student at the layers of the levels (see `Fusion`).
    """

    stage: list[int | float]
    pool: list[PositiveInt | Literal["whole"]]
    weight: list[NonNegativeFloat]
    view: list[Literal["same", "other"]] = field(default_factory=lambda: ["same"])
    project: list[bool] = field(default_factory=lambda: [False])
    predictor: list[Literal["attention", "matching"]] = field(default_factory=lambda: ["attention"])
    matching: Any = None
    loss: Mapping[str, Any] = field(default_factory=dict)
    summary: NonNegativeFloat = 0.0
    summary_tokens: NonNegativeInt = 0
    fusion: Literal["none", "add", "concat"] = "none"
    upper: Any = None

    def __post_init__(self) -> None:
        if not len(self.stage) == len(self.pool) == len(self.weight) <= MAX_LEVELS:
            raise UserError(
                f"levels.stage={list(self.stage)}, levels.pool={list(self.pool)} and levels.weight={list(self.weight)} "
                f"need one entry per level each, for at most {MAX_LEVELS} levels."
            )
        for option in ("view", "project", "predictor"):
            if len(entries := getattr(self, option)) not in (1, len(self.pool)):
                raise UserError(
                    f"levels.{option}={list(entries)} needs one entry for all levels, or one per level ({len(self.pool)})."
                )
        if unknown := sorted(set(self.loss) - set(self.names())):
            raise UserError(f"levels.loss.{unknown[0]} names no level; the levels are {', '.join(self.names()) or 'none'}.")
        if self.upper and not self.pool:
            raise UserError("levels.upper needs a level below it; set levels.stage, levels.pool and levels.weight to one entry.")
        if self.summary and not (self.summary_tokens and self.pool and self.view[0] == "same"):
            raise UserError(
                f"levels.summary={self.summary} needs summary tokens and a first level whose targets lie in the same view, but "
                f"levels.summary_tokens={self.summary_tokens} and levels.view={list(self.view)} for {len(self.pool)} levels."
            )

    def names(self) -> list[str]:
        """Return short names for metrics, beginning with `level1`."""
        return [f"level{i}" for i in range(1, len(self.pool) + 1)]

    def resolve(self, encoder: Encoder) -> list[Level]:
        """Return the levels with the sizes that an encoder gives them.

        Raises:
            UserError: If the encoder has no such stage or no summary tokens, or cells do not divide its grid.
        """
        if encoder.num_summary_tokens != self.summary_tokens:
            raise UserError(
                f"levels.summary_tokens={self.summary_tokens}: {type(encoder).__name__} has no summary tokens; choose levels "
                "without them, such as levels=flat or levels=pyramid."
            )
        levels: list[Level] = []
        for number, (name, stage, pool, weight) in enumerate(zip(self.names(), self.stage, self.pool, self.weight, strict=True)):
            view, project, predictor = entry(self.view, number), entry(self.project, number), entry(self.predictor, number)
            layer, match = resolve_layer(stage, encoder), predictor == "matching"
            if view == "same" and (match or pool == "whole"):
                wrong = "levels.predictor=matching" if match else "levels.pool=whole"
                raise UserError(
                    f"{wrong} needs targets in another view, but levels.view={list(self.view)}: in the same view, the targets "
                    "are cells that are hidden from the student; set levels.view=[other]."
                )
            if match and self.matching is None:
                raise UserError(f"levels.predictor={list(self.predictor)} needs levels.matching, which is null.")
            grid, dim = encoder.layer_grids[layer - 1], encoder.layer_dims[layer - 1]
            cells: int | None = None
            side = 1
            if pool == "whole":
                dim = encoder.feature_dims[layer - 1]
            else:
                self.check_pool(pool, grid, f"{encoder.layer_name} {layer}")
                cells, side = pool, grid // pool
            slot = sum(level.match == match for level in levels)
            level = Level(name, layer, cells, side, dim, weight, view == "other", project, match, slot)
            levels.append(replace(level, mask_pool=max(1, encoder.grid // side), refine=max(1, side // encoder.grid)))
        self.check_masked(levels, encoder.grid)
        return levels

    def check_pool(self, pool: int, grid: int, where: str) -> None:
        """Raise `UserError` if cells do not divide a grid, or leave fewer than 2x2 of them."""
        if grid % pool or grid // pool < 2:
            raise UserError(
                f"levels.pool={list(self.pool)} does not fit the grid of {grid}x{grid} of {where}: every pool must divide {grid} "
                "and leave at least 2x2 cells; use smaller pools, smaller patches or larger images, or pool=whole."
            )

    def check_masked(self, levels: list[Level], grid: int) -> None:
        """Raise `UserError` if the cells of the masked levels do not nest."""
        pools = [level.mask_pool for level in levels if not level.other]
        if any(max(pools) % pool for pool in pools):
            raise UserError(f"levels.pool={list(self.pool)}: each entry must divide the largest one, as in [1, 2, 4].")
        for level in levels:
            if not level.other and max(grid, level.grid) % min(grid, level.grid):
                raise UserError(
                    f"levels.pool={list(self.pool)}: the {level.grid}x{level.grid} cells of {level.name} and the {grid}x{grid} "
                    "patches, which are hidden as a whole, do not nest; use another pool."
                )


def entry(values: list[T], number: int) -> T:
    """Return `values[number]`, or the only value of a list that has one entry for all levels."""
    return values[number] if len(values) > 1 else values[0]


def resolve_layer(stage: int | float, encoder: Encoder) -> int:
    """Return the number of the layer that an entry of `levels.stage` means, in 1..num_layers."""
    count = encoder.num_layers
    if isinstance(stage, int) and 1 <= abs(stage) <= count:
        return stage if stage > 0 else count + 1 + stage
    if isinstance(stage, float) and 0 < stage < 1:
        return max(1, math.floor(stage * count + 0.5))
    raise UserError(
        f"levels.stage={stage}: {type(encoder).__name__} has the layers 1 to {count}; expected one of these numbers, -1 to "
        f"-{count} counted from the last layer, or a fraction of their number between 0 and 1."
    )


def pool_cells(tokens: Float[Tensor, "b n d"], grid: int, pool: int) -> Float[Tensor, "b m d"]:
    """Average tokens over `pool` x `pool` cells of a grid: [B, grid^2, D] -> [B, (grid/pool)^2, D]."""
    if pool == 1:
        return tokens
    side = grid // pool
    return tokens.unflatten(1, (side, pool, side, pool)).mean((2, 4)).flatten(1, 2)


def cell_centers(side: int, device: torch.device | None = None) -> Float[Tensor, "n 2"]:
    """Return the centers (row, column) of side x side cells of a square from -1 to 1, in raster order."""
    axis = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) * (2 / side) - 1
    return torch.cartesian_prod(axis, axis)
