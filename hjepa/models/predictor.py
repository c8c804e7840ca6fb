"""The predictor: a narrow transformer that predicts the targets of every level from the tokens of the context.

A query is the mask token of a level plus the position of the center of a target cell; every level has its own output head. With
self-attention, queries and context attend to each other: either all queries of all levels in one pass, or each target block in
a pass of its own (`joint: false`, as in I-JEPA, Assran et al. 2023). With cross-attention, queries attend to the context only
(CrossMAE, Fu et al. 2024), so that each is answered independently of the others and one pass is equivalent to many.

`Fusion` precedes the predictor: it combines the student's stages at several depths, as a feature pyramid does (Lin et al. 2017).
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.types import PositiveInt
from hjepa.models.encoder import Stage
from hjepa.models.layers import CrossBlock, LeanMlp, grid_centers, init_xavier, sincos_positions


class Predictor(nn.Module):
    """Predicts the target cells of all levels.

    Args:
        encoder_dim: Width of the context tokens.
        grid: Side of the grid of patches.
        pools: Side of a target cell in patches, per level.
        dim: Width of the predictor, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Number of attention heads.
        attention: "self" or "cross".
        joint: With self-attention, use one pass for all target blocks of all levels instead of one pass per block.
        target_dims: Width of the targets, per level; None for the width of the context tokens.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: int,
        pools: Sequence[int],
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        attention: Literal["self", "cross"] = "cross",
        joint: bool = True,
        target_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise UserError(f"model.predictor.dim={dim} must be a multiple of 4 and of heads={heads}; change either of them.")
        self.cross, self.joint = attention == "cross", joint or attention == "cross"
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_tokens = nn.Parameter(torch.randn(len(pools), dim) * 0.02)
        block = CrossBlock if self.cross else partial(Block, qkv_bias=True, mlp_layer=LeanMlp)
        self.blocks = nn.ModuleList(block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, width) for width in target_dims or [encoder_dim] * len(pools))
        for level, pool in enumerate(pools):
            self.register_buffer(f"positions{level}", sincos_positions(grid_centers(grid, pool), dim), persistent=False)
        self.register_buffer("patch_positions", sincos_positions(grid_centers(grid), dim), persistent=False)
        self.apply(init_xavier)

    def queries(self, level: int, targets: Int[Tensor, "b c p t"]) -> Float[Tensor, "m p t d"]:
        """Return the queries of a level, [B*C, P, T, dim]."""
        positions: Tensor = getattr(self, f"positions{level}")
        return positions[targets.flatten(0, 1)] + self.mask_tokens[level]

    def forward(
        self, tokens: Float[Tensor, "m n d"], context: Int[Tensor, "b c k"] | None, targets: Sequence[Int[Tensor, "b c _ _"]]
    ) -> list[Float[Tensor, "b c _ _ _"]]:
        """Predict the targets of the first `len(targets)` levels.

        Args:
            tokens: [B*C, S+K, D], S summary tokens followed by the K patches of the context, or summary tokens alone.
            context: Patch indices [B, C, K] of the context; None if `tokens` consists of summary tokens alone.
            targets: Cell indices [B, C, P, T] of every level, where P and T depend on the level.

        Returns:
            The predictions [B, C, P, T, D] of every level.
        """
        x = self.embed(tokens)
        if context is not None:
            positions = self.patch_positions[context.flatten(0, 1)]  # type: ignore[index]  # a buffer
            num_patches = positions.shape[1]
            x = torch.cat([x[:, :-num_patches], x[:, -num_patches:] + positions], dim=1)
        queries = [self.queries(level, index) for level, index in enumerate(targets)]
        if self.joint:
            answers = self.answer(x, torch.cat([q.flatten(1, 2) for q in queries], dim=1))
            by_level = answers.split([q.shape[1] * q.shape[2] for q in queries], dim=1)
        else:
            by_level = tuple(self.answer_each(x, q) for q in queries)
        rows = zip(self.heads, by_level, targets, strict=False)  # the summary pass predicts the first level only
        return [head(answer).view(*index.shape, -1) for head, answer, index in rows]

    def answer(self, context: Float[Tensor, "m k d"], queries: Float[Tensor, "m t d"]) -> Float[Tensor, "m t d"]:
        """Answer all queries in one pass."""
        if self.cross:
            for block in self.blocks:
                queries = block(queries, context)
            return self.norm(queries)
        x = torch.cat([context, queries], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, context.shape[1] :])

    def answer_each(self, context: Float[Tensor, "m k d"], queries: Float[Tensor, "m p t d"]) -> Float[Tensor, "m pt d"]:
        """Answer each of P target blocks in a pass of its own, [M, P*T, dim]."""
        count = queries.shape[1]
        answers = self.answer(context.repeat_interleave(count, dim=0), queries.flatten(0, 1))
        return answers.unflatten(0, (-1, count)).flatten(1, 2)


class Fusion(nn.Module):
    """Combines the student's stages at several layers into the context tokens of the predictor.

    Args:
        mode: "none" returns the last stage. "add" adds a linear map, initially zero, of the other stages. "concat" maps the
            concatenation of all stages. The other stages are normalized first; a finer one is averaged over every patch.
        dims: Token widths of the stages by ascending layer.
    """

    def __init__(self, mode: Literal["none", "add", "concat"], dims: Sequence[int]) -> None:
        super().__init__()
        if mode != "none" and len(dims) < 2:
            raise UserError(f"levels.fusion={mode} needs a level at a layer before the last one, as in levels=depth.")
        self.mode = mode
        *shallow, last = dims
        inputs = {"none": 0, "add": sum(shallow), "concat": sum(dims)}[mode]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in (shallow if inputs else []))
        self.mix: nn.Module = nn.Linear(inputs, last) if inputs else nn.Identity()
        if mode == "add":
            for parameter in self.mix.parameters():
                nn.init.zeros_(parameter)

    def forward(self, stages: list[Stage]) -> Float[Tensor, "m n d"]:
        """Return tokens [M, S+K, D] of all stages, which are in ascending order; the last one is normalized already."""
        *shallow, last = stages
        if self.mode == "none":
            return last.tokens
        normed = [norm(average_to(stage, last.cells.shape[1])) for norm, stage in zip(self.norms, shallow, strict=True)]
        mixed: Tensor = self.mix(torch.cat(normed if self.mode == "add" else [last.tokens, *normed], dim=-1))
        return last.tokens + mixed if self.mode == "add" else mixed


def average_to(stage: Stage, num_patches: int) -> Float[Tensor, "m n d"]:
    """Return the tokens of a stage of which the r*r cells of each patch, which follow one another, are averaged."""
    if stage.cells.shape[1] == num_patches:
        return stage.tokens
    return torch.cat([stage.summary, stage.cells.unflatten(1, (num_patches, -1)).mean(2)], dim=1)
