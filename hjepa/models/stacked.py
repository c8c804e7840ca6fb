"""Stacked levels: a level with its own encoder, teacher, predictor and (larger) masks above the representation of another level.

The tokens of the level below are averaged over 2-D cells. The student of the stacked level encodes some of the cells and
predicts the output of its teacher at others, exactly as the level below does with patches.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Generator, Tensor, nn
from torch.nn.functional import layer_norm

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeFloat, PositiveInt
from hjepa.masking import Masks, MaskSampler
from hjepa.models.layers import LeanMlp, gather_tokens, grid_centers, init_xavier, sincos_positions
from hjepa.models.levels import Level, cell_centers, pool_cells
from hjepa.models.predictor import Context, Predictor
from hjepa.models.views import Queries


class CellEncoder(nn.Module):
    """A small transformer over the cells of a grid.

    Args:
        input_dim: Width of the cells.
        grid: Side of the grid of cells.
        dim: Token width.
        depth: Number of blocks.
        heads: Number of attention heads.
    """

    def __init__(self, input_dim: int, grid: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_dim, dim)
        self.register_buffer("positions", sincos_positions(grid_centers(grid), dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True, mlp_layer=LeanMlp) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.apply(init_xavier)

    def forward(self, cells: Float[Tensor, "b n d"], keep: Int[Tensor, "b c k"] | None = None) -> Float[Tensor, "m k w"]:
        """Encode all cells ([B, N, dim]) or the kept ones only ([B*C, K, dim])."""
        x = self.embed(cells) + self.positions
        if keep is not None:
            x = gather_tokens(x, keep).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed


class StackedLevel(nn.Module):
    """A level above another one.

    Args:
        input_dim: Width of the tokens of the level below.
        grid: Side of the grid of the level below.
        pool: Side of a cell in tokens of the level below.
        dim: Token width of the encoder, a multiple of 4 and of `heads`.
        depth: Number of blocks of the encoder.
        heads: Number of attention heads of the encoder.
        predictor: Constructor that takes the sizes as further arguments.
        masking: Constructor that takes the grid and the pools as further arguments.
        weight: Factor of the loss of the level.
        detach: Feed the student with the output of the teacher below, so that the student below is not trained by this level.
            Otherwise it is fed with the output of the student below, which then has to encode the whole image as well.
        upper: Constructor of the next level, or None.
    """

    teacher_is_given = False

    def __init__(
        self,
        input_dim: int,
        grid: int,
        pool: PositiveInt,
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        predictor: Callable[..., Predictor],
        masking: Callable[..., MaskSampler],
        weight: NonNegativeFloat,
        detach: bool,
        upper: Callable[..., "StackedLevel"] | None,
    ) -> None:
        super().__init__()
        if grid % pool or grid // pool < 4:
            raise UserError(
                f"levels.upper.pool={pool} does not divide a grid of {grid}x{grid} into 4x4 or more cells; use a smaller divisor."
            )
        if dim % heads or dim % 4:
            raise UserError(f"levels.upper.dim={dim} must be a multiple of 4 and of heads={heads}; change either of them.")
        self.grid, self.side, self.pool, self.weight, self.detach = grid, grid // pool, pool, weight, detach
        self.level = Level("stacked", depth, 1, self.side, dim)
        self.student = CellEncoder(input_dim, self.side, dim, depth, heads)
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.predictor = predictor(encoder_dim=dim, levels=[self.level])
        self.sampler = masking(grid=self.side, pools=[1])
        self.upper = upper(input_dim=dim, grid=self.side) if upper else None

    def forward(
        self,
        below: Float[Tensor, "b n d"],
        below_by_student: Callable[[], Float[Tensor, "b n d"]],
        masks: tuple[Masks, ...],
    ) -> list[tuple[float, Tensor, Tensor]]:
        """Predict the targets of this level and of those above it.

        Args:
            below: Tokens of the level below, computed by its teacher.
            below_by_student: Computes the same tokens with the student below; called only without `detach`.
            masks: Masks of this level and of those above it.

        Returns:
            Weight, prediction [B, C, P, T, dim] and target [B, C, P, T, dim] of every level.
        """
        mask, *masks_above = masks
        cells = pool_cells(below.detach() if self.detach else below, self.grid, self.pool)
        student_cells = cells if self.detach else pool_cells(below_by_student(), self.grid, self.pool)
        with torch.set_grad_enabled(self.teacher is self.student and torch.is_grad_enabled()):
            encoded = self.teacher(cells)
            target = gather_tokens(encoded, mask.targets[0])
            target = layer_norm(target.float(), target.shape[-1:])
        centers = cell_centers(self.side, cells.device)
        context = Context(self.student(student_cells, mask.context), centers[mask.context.flatten(0, 1)], self.side)
        prediction = self.predictor(context, [Queries(self.level, centers[mask.targets[0]])])[0]
        levels = [(self.weight, prediction, target)]
        if self.upper:
            levels += self.upper(encoded, lambda: self.student(student_cells), tuple(masks_above))
        return levels

    @property
    def encoder(self) -> CellEncoder:
        """The encoder that is evaluated: the teacher or, if that never changes, the student."""
        return self.student if self.teacher_is_given else self.teacher

    def share_teacher(self) -> None:
        """Let every student from here upwards be its own teacher."""
        self.teacher = self.student
        if self.upper:
            self.upper.share_teacher()

    def stacked_levels(self) -> list["StackedLevel"]:
        """Return this level and those above it."""
        return [self, *(self.upper.stacked_levels() if self.upper else [])]


class StackedMaskSampler:
    """Samples the masks of the levels of the image together with those of all stacked levels."""

    def __init__(self, sampler: MaskSampler, stacked_levels: list[StackedLevel]) -> None:
        self.sampler, self.samplers = sampler, [level.sampler for level in stacked_levels]
        self.num_contexts, self.hides_patches = sampler.num_contexts, sampler.hides_patches

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        masks = self.sampler(batch_size, generator)
        return Masks(masks.context, masks.targets, tuple(sampler(batch_size, generator) for sampler in self.samplers))
