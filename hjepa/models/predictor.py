"""Predictors: from the student's stages over a context to the targets of every level.

`Predictor` is a narrow transformer. A query is the mask token of a level plus the position of the center of a target cell in the
context's view; every level has its own output head. With self-attention, queries and context attend to each other: either all
queries of all levels in one pass, or each target block in a pass of its own (`joint: false`, as in I-JEPA, Assran et al. 2023).
With cross-attention, queries attend to the context only (CrossMAE, Fu et al. 2024), so that each is answered independently of
the others and one pass is equivalent to many. A query for a cell of another view also knows how the two views differ (image world
models, Garrido et al. 2024).

`MatchingPredictor` reads the student's cells at the place of the target. It is cheap, and serves levels whose targets lie in
other views.

`Fusion` precedes the transformer: it combines the student's stages at several depths, as a feature pyramid does (Lin et al.
2017).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeInt, PositiveInt
from hjepa.models.encoder import Stage
from hjepa.models.layers import CrossBlock, LeanMlp, init_xavier, sincos_positions
from hjepa.models.levels import Level, pool_cells
from hjepa.models.views import Queries

MAX_SIDE = 16  # of the maps that `read_cells` interpolates by a matrix product

CHANGES = 3  # relative height, relative width, mirrored


class Context(NamedTuple):
    """The student's output over C contexts of each of B images.

    Attributes:
        tokens: Tokens [B*C, S+K, D] after the fusion of the stages: S summary tokens followed by the K visible patches.
        places: Centers (row, column) [B*C, K, 2] of the visible patches, from -1 to 1; None if `tokens` are summary tokens only.
        grid: Side of the grid of patches of the context's view.
        cells: The cells [B, C, N, D] by level that `MatchingPredictor` reads; empty if patches are hidden.
    """

    tokens: Float[Tensor, "m n d"]
    places: Float[Tensor, "m k 2"] | None
    grid: int
    cells: Mapping[str, Tensor] = MappingProxyType({})


class Predictor(nn.Module):
    """A transformer that predicts the target cells of the levels.

    Args:
        encoder_dim: Width of the context tokens.
        levels: The levels.
        dim: Width of the predictor, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Number of attention heads.
        attention: "self" or "cross".
        joint: With self-attention, use one pass for all target blocks of all levels instead of one pass per block.
    """

    def __init__(
        self,
        encoder_dim: int,
        levels: Sequence[Level],
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        attention: Literal["self", "cross"] = "cross",
        joint: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise UserError(f"model.predictor.dim={dim} must be a multiple of 4 and of heads={heads}; change either of them.")
        self.dim, self.cross, self.joint = dim, attention == "cross", joint or attention == "cross"
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_tokens = nn.Parameter(torch.randn(len(levels), dim) * 0.02)
        block = CrossBlock if self.cross else partial(Block, qkv_bias=True, mlp_layer=LeanMlp)
        self.blocks = nn.ModuleList(block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleList(nn.Linear(dim, level.dim) for level in levels)
        self.change: nn.Module = nn.Linear(CHANGES, dim) if any(level.other for level in levels) else nn.Identity()
        self.apply(init_xavier)

    def positions(self, places: Float[Tensor, "*shape 2"], grid: int) -> Float[Tensor, "*shape d"]:
        """Return the position embeddings of places in a view with the given grid of patches; a patch lies at its own index."""
        return sincos_positions((places + 1) * (grid / 2) - 0.5, self.dim)

    def embed_queries(self, queries: Queries, grid: int) -> Float[Tensor, "m p t d"]:
        """Return the embedded queries of a level, [B*C, P, T, dim]."""
        x = self.positions(queries.places, grid) + self.mask_tokens[queries.level.slot]
        if queries.change is not None:
            x = x + self.change(queries.change).unsqueeze(3)
        return x.flatten(0, 1)

    def forward(self, context: Context, queries: Sequence[Queries]) -> list[Float[Tensor, "b c p t d"]]:
        """Return the predictions [B, C, P, T, D] of the queries of some levels, where D is the width of the level's targets."""
        x = self.embed(context.tokens)
        if context.places is not None:
            positions = self.positions(context.places, context.grid)
            num_patches = positions.shape[1]
            x = torch.cat([x[:, :-num_patches], x[:, -num_patches:] + positions], dim=1)
        embedded = [self.embed_queries(q, context.grid) for q in queries]
        if self.joint:
            answers = self.answer(x, torch.cat([q.flatten(1, 2) for q in embedded], dim=1))
            by_level = answers.split([q.shape[1] * q.shape[2] for q in embedded], dim=1)
        else:
            by_level = tuple(self.answer_each(x, q) for q in embedded)
        rows = zip(queries, by_level, strict=True)
        return [self.heads[q.level.slot](answer).view(*q.places.shape[:-1], -1) for q, answer in rows]

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


class MatchingPredictor(nn.Module):
    """Reads the student's cells of a level at the place of the target, by bilinear interpolation.

    An MLP may map the cells first. Without one, the prediction is the student's own output there, as in the contrast of matched
    cells of VICRegL (Bardes et al. 2022) and, for a whole image, of MoCo v3 (Chen et al. 2021). If the level has a projector, the
    cells are projected before they are interpolated, so that each cell is projected once, whatever the number of queries.

    Args:
        levels: The levels; their targets lie in other views.
        depth: Number of linear maps of the MLP; 0 for none.
        hidden: Width of the hidden layers of the MLP.
    """

    def __init__(self, levels: Sequence[Level], depth: NonNegativeInt = 0, hidden: PositiveInt = 512) -> None:
        super().__init__()
        self.depth = depth
        self.mlps = nn.ModuleList(self.build_mlp(level.dim, hidden, depth) for level in levels)

    @staticmethod
    def build_mlp(dim: int, hidden: int, depth: int) -> nn.Module:
        """Return an MLP of `depth` linear maps that keeps the width, or the identity."""
        widths = [dim, *[hidden] * (depth - 1), dim][: depth + 1]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths):
            modules += [nn.Linear(before, after), nn.GELU()]
        return nn.Sequential(*modules[:-1])

    def map(self, level: Level, cells: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        """Apply the MLP of a level to its cells."""
        mapped: Tensor = self.mlps[level.slot](cells)
        return mapped

    def forward(self, context: Context, queries: Sequence[Queries]) -> list[Float[Tensor, "b c p t d"]]:
        """Return the predictions [B, C, P, T, D] of the queries of some levels, where D is the width of the level's cells."""
        return [read_cells(context.cells[query.level.name], query.places) for query in queries]


def read_cells(cells: Float[Tensor, "b c n d"], places: Float[Tensor, "b c p t 2"]) -> Float[Tensor, "b c p t d"]:
    """Interpolate the cells of C views at places (row, column) from -1 to 1; a single cell is the same everywhere.

    With few cells, a matrix product takes less time than `grid_sample`, and Apple's GPUs compute its gradient with every version
    of torch. Its cost grows with the product of cells and places, so that large maps are left to `grid_sample`.
    """
    if cells.shape[2] == 1:
        return cells.unsqueeze(2).expand(*places.shape[:4], -1)
    side = math.isqrt(cells.shape[2])
    if side > MAX_SIDE:
        maps, points = cells.flatten(0, 1).mT.unflatten(2, (side, side)), places.flatten(0, 1).flip(-1)  # (x, y)
        read = F.grid_sample(maps.to(points.dtype), points, padding_mode="border", align_corners=False)
        return read.movedim(1, -1).unflatten(0, places.shape[:2])
    index = ((places + 1) * (side / 2) - 0.5).clamp(0, side - 1)  # fractional (row, column)
    by_axis = (1 - (index.unsqueeze(-1) - torch.arange(side, device=index.device)).abs()).clamp(min=0)
    weights = (by_axis[..., 0, :, None] * by_axis[..., 1, None, :]).flatten(-2)  # [B, C, P, T, N]
    read = weights.flatten(2, 3) @ cells.to(weights.dtype)
    return read.unflatten(2, places.shape[2:4])


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
    """Average the cells of a finer layer over each patch; summary tokens stay as they are.

    The cells of a complete view are in raster order; where patches are hidden, the cells of a patch follow one another.
    """
    cells = stage.cells
    if cells.shape[1] == num_patches:
        return stage.tokens
    if cells.shape[1] == stage.grid**2:
        cells = pool_cells(cells, stage.grid, stage.grid // math.isqrt(num_patches))
    else:
        cells = cells.unflatten(1, (num_patches, -1)).mean(2)
    return torch.cat([stage.summary, cells], dim=1)
