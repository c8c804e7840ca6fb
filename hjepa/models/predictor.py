"""The predictor: a narrow transformer that fills in the targets of every level from the context's tokens.

Queries are a mask token per level plus the 2-D position of the target cell's center; every level has its own head. With
self-attention, queries and context attend to each other: all queries of all levels share one pass with the context, or each
target block has a pass of its own (`joint: false`, as in I-JEPA, Assran et al. 2023). With cross-attention the queries attend
to the context only and each is answered on its own (CrossMAE, Fu et al. 2024), so that one pass is the same as many.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.layers import CrossBlock, LeanMlp, Recomputing, grid_centers, init_xavier, sincos_positions


class Predictor(Recomputing):
    """Predicts target cells of all levels.

    Args:
        encoder_dim: width of the context tokens and of the targets.
        grid: side of the patch grid; pools: side of a target cell in patches, per level.
        dim, depth, heads: width, number of blocks and attention heads.
        attention: "self" or "cross".
        joint: with self-attention, one pass for all target blocks of all levels, or one pass for each block of each level.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: int,
        pools: Sequence[int],
        dim: int,
        depth: int,
        heads: int,
        attention: Literal["self", "cross"] = "cross",
        joint: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise UserError(f"A predictor of dim={dim} needs a dim that 4 and heads={heads} divide; change either.")
        self.cross, self.joint = attention == "cross", joint or attention == "cross"
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_tokens = nn.Parameter(torch.randn(len(pools), dim) * 0.02)
        block = CrossBlock if self.cross else partial(Block, qkv_bias=True, mlp_layer=LeanMlp)
        self.blocks = nn.ModuleList(block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, encoder_dim) for _ in pools)
        for level, pool in enumerate(pools):
            self.register_buffer(f"positions{level}", sincos_positions(grid_centers(grid, pool), dim), persistent=False)
        self.register_buffer("patch_positions", sincos_positions(grid_centers(grid), dim), persistent=False)
        self.apply(init_xavier)

    def queries(self, level: int, targets: Tensor) -> Tensor:
        """Queries of a level: int64 [B, C, P, T] -> [B*C, P, T, dim]."""
        positions: Tensor = getattr(self, f"positions{level}")
        return positions[targets.flatten(0, 1)] + self.mask_tokens[level]

    def forward(self, tokens: Tensor, context: Tensor | None, targets: Sequence[Tensor]) -> list[Tensor]:
        """Predict the targets of the first `len(targets)` levels.

        Args:
            tokens: [B*C, S+K, D], S summary tokens and the K context patches, or summary tokens alone.
            context: int64 [B, C, K], where the patches are; None where `tokens` has summary tokens alone.
            targets: per level int64 [B, C, P, T_l].

        Returns:
            Per level [B, C, P, T_l, D].
        """
        x = self.embed(tokens)
        if context is not None:
            places = self.patch_positions[context.flatten(0, 1)]  # type: ignore[index]  # a buffer
            x = torch.cat([x[:, : -places.shape[1]], x[:, -places.shape[1] :] + places], dim=1)
        queries = [self.queries(level, index) for level, index in enumerate(targets)]
        if self.joint:
            answers = self.answer(x, torch.cat([q.flatten(1, 2) for q in queries], dim=1))
            parts = answers.split([q.shape[1] * q.shape[2] for q in queries], dim=1)
        else:
            parts = tuple(self.answer_each(x, q) for q in queries)
        return [
            head(part).view(*index.shape, -1)
            for head, part, index in zip(self.heads, parts, targets, strict=False)  # the summary pass asks the first level only
        ]

    def answer(self, context: Tensor, queries: Tensor) -> Tensor:
        """One pass: context [M, K, dim] and queries [M, T, dim] -> [M, T, dim]."""
        if self.cross:
            for block in self.blocks:
                queries = self.run(block, queries, context)
            return self.norm(queries)
        x = torch.cat([context, queries], dim=1)
        for block in self.blocks:
            x = self.run(block, x)
        return self.norm(x[:, context.shape[1] :])

    def answer_each(self, context: Tensor, queries: Tensor) -> Tensor:
        """A pass per block: context [M, K, dim] and queries [M, P, T, dim] -> [M, P*T, dim]."""
        blocks = queries.shape[1]
        return (
            self.answer(context.repeat_interleave(blocks, dim=0), queries.flatten(0, 1)).unflatten(0, (-1, blocks)).flatten(1, 2)
        )


class Fusion(nn.Module):
    """Tokens of one width from hidden states at several depths.

    Args:
        mode: "none" passes the last state on; "add" adds a linear map of every other state, normalized, which starts at zero;
            "concat" maps all of them, normalized and concatenated, to one.
        dim: width of the states; depths: how many there are.
    """

    def __init__(self, mode: Literal["none", "add", "concat"], dim: int, depths: int) -> None:
        super().__init__()
        if mode != "none" and depths < 2:
            raise UserError(f"levels.fusion={mode} needs a level at another depth than the last block, as in levels=depth.")
        self.mode = mode
        inputs = {"none": 0, "add": depths - 1, "concat": depths}[mode]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depths - 1 if inputs else 0))
        self.mix: nn.Module = nn.Linear(inputs * dim, dim) if inputs else nn.Identity()
        if mode == "add":
            for parameter in self.mix.parameters():
                nn.init.zeros_(parameter)

    def forward(self, states: list[Tensor]) -> Tensor:
        """States [M, S+K, D] by ascending depth, the last one normalized already -> [M, S+K, D]."""
        *shallow, last = states
        if self.mode == "none":
            return last
        normed = [norm(state) for norm, state in zip(self.norms, shallow, strict=True)]
        mixed: Tensor = self.mix(torch.cat(normed if self.mode == "add" else [last, *normed], dim=-1))
        return last + mixed if self.mode == "add" else mixed
