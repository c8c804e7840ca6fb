"""Mask samplers: which patches the student sees and which cells it has to predict.

A sampler is built for a patch grid and the levels' pools and called as `sampler(batch_size, generator) -> Masks`. Counts are
the same for all images of a batch (no padding, no validity flags), context and targets are disjoint, indices are sorted,
and the cells of a pooled level consist of target patches only. Sampling is vectorized over the batch, never retries, and
runs on the CPU from its own generator. To add a strategy, write one class with `__call__` here and one YAML in conf/masking.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from hjepa.config.errors import UserError


@dataclass(frozen=True)
class Masks:
    """`context` int64 [B, C, K] into the patch grid; `targets` per level int64 [B, C, P, T_l] into the level's grid.

    C contexts per image, P target blocks per context; `stacked` holds the masks of stacked levels, on their own grids.
    """

    context: Tensor
    targets: tuple[Tensor, ...]
    stacked: tuple["Masks", ...] = ()

    def to(self, device: torch.device) -> "Masks":
        """The same masks on a device."""
        targets = tuple(t.to(device, non_blocking=True) for t in self.targets)
        return Masks(self.context.to(device, non_blocking=True), targets, tuple(masks.to(device) for masks in self.stacked))

    def select(self, rows: Tensor) -> "Masks":
        """Those of some images of the batch."""
        return Masks(
            self.context[rows], tuple(t[rows] for t in self.targets), tuple(masks.select(rows) for masks in self.stacked)
        )

    def split(self, parts: int) -> list["Masks"]:
        """Equal parts along the batch, in order."""
        targets = list(zip(*(t.chunk(parts) for t in self.targets), strict=True)) or [()] * parts
        stacked = list(zip(*(masks.split(parts) for masks in self.stacked), strict=True)) or [()] * parts
        return [Masks(*part) for part in zip(self.context.chunk(parts), targets, stacked, strict=True)]


def block_sides(area: float, aspect: float, grid: int, align: int = 1, most: float = math.inf) -> tuple[int, int]:
    """Height and width of a block of about `area` patches and at most `most`, unless a single row of cells is more.

    Both are multiples of `align`, at least one, at most the grid; `aspect` is height / width (I-JEPA, Assran et al. 2023).
    """
    cells = grid // align
    height = min(cells, max(1, round(math.sqrt(area * aspect) / align)))
    row = height * align * align
    width = min(cells, max(1, min(round(area / row), int(min(most, grid * grid) // row))))
    return height * align, width * align


def place_blocks(shape: tuple[int, ...], sides: tuple[int, int], grid: int, align: int, generator: Generator) -> Tensor:
    """Uniform positions for blocks: patch indices int64 [*shape, h*w] in raster order, corners on multiples of `align`."""
    height, width = sides
    top = torch.randint((grid - height) // align + 1, (*shape, 1, 1), generator=generator) * align
    left = torch.randint((grid - width) // align + 1, (*shape, 1, 1), generator=generator) * align
    rows = top + torch.arange(height).unsqueeze(-1)
    return (rows * grid + left + torch.arange(width)).flatten(-2)


def place_cells(blocks: Tensor, sides: tuple[int, int], grid: int, pool: int) -> Tensor:
    """The cells of a `pool`ed grid inside aligned blocks: [..., h*w] patch indices -> [..., h*w/pool^2] cell indices."""
    corners = blocks.unflatten(-1, sides)[..., ::pool, ::pool]
    return (corners // grid // pool * (grid // pool) + corners % grid // pool).flatten(-2)


def cells_to_patches(cells: Tensor, grid: int, pool: int) -> Tensor:
    """Patches of cells: [..., T] cell indices -> [..., T * pool^2] patch indices."""
    side = grid // pool
    corner = (cells // side) * pool * grid + (cells % side) * pool
    inside = (torch.arange(pool).unsqueeze(1) * grid + torch.arange(pool)).flatten()
    return (corner.unsqueeze(-1) + inside).flatten(-2)


def mark(index: Tensor, size: int) -> Tensor:
    """Sets as flags: [B, ..., T] indices -> bool [B, size], true where any of the indices points."""
    flags = torch.zeros(len(index), size, dtype=torch.bool)
    return flags.scatter_(1, index.flatten(1), True)


def draw(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores along the last dimension, sorted."""
    return score.topk(count, dim=-1).indices.sort(dim=-1).values


def uniform(low_high: Sequence[float], generator: Generator) -> float:
    low, high = low_high
    return low + (high - low) * torch.rand((), generator=generator).item()


def log_uniform(low_high: Sequence[float], generator: Generator) -> float:
    return math.exp(uniform([math.log(v) for v in low_high], generator))


def check_range(name: str, values: Sequence[float], low: float, high: float) -> None:
    """Refuse a [low, high] option that is no ascending pair inside (low, high]."""
    if len(values) != 2 or not low < values[0] <= values[1] <= high:
        raise UserError(
            f"masking.{name}={list(values)}: expected [smallest, largest] with {low:g} < smallest <= largest <= {high:g}."
        )


class MaskSampler(ABC):
    """Common ground of the samplers: the patch grid's side, the pool of every level, the coarsest pool (`align`)."""

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        self.grid, self.pools, self.patches = grid, tuple(pools), grid * grid
        self.align = max(self.pools, default=1)

    @abstractmethod
    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        """Sample masks for a batch."""

    def context_beside(self, targets: Tensor, wanted: Tensor, floor: int, generator: Generator) -> Tensor:
        """A random context that avoids the targets: as many patches as every image of the batch can offer.

        Args:
            targets: bool [B, N], patches that are predicted.
            wanted: bool [B, N], the block that the context is taken from.
            floor: a count that every image has outside its targets; images whose block is covered by targets fall back
                on patches outside the block, so a small count in one image does not starve the batch.

        Returns:
            int64 [B, 1, K], sorted.
        """
        candidates = wanted & ~targets
        count = max(floor, int(candidates.sum(1).min()))
        score = torch.rand(targets.shape, generator=generator) + candidates.float() - 2 * targets.float()
        return draw(score, count).unsqueeze(1)

    def check_context_left(self, covered: int, what: str) -> int:
        """The patches that are left when `covered` are targets; refuse to go on when none is."""
        left = self.patches - covered
        if left < 1:
            raise UserError(
                f"{what} can cover all {self.patches} patches of the {self.grid}x{self.grid} grid and leave no context; "
                "use fewer or smaller target blocks, smaller patches or larger images."
            )
        return left


class MultiblockMasking(MaskSampler):
    """I-JEPA's multi-block masking (Assran et al. 2023): one large context block minus several target blocks.

    As in I-JEPA, the blocks' size is drawn once per batch and their positions per image. Unlike there, the context is cut to
    the batch's common count by a random choice, not by dropping the last rows. Where levels pool, the blocks lie on the
    coarsest level's cells and every level predicts the same regions.

    Args:
        target_scale, context_scale: ranges of the share of patches, the former cut where all blocks together could cover the
            image; target_aspect: range of height / width.
        blocks: target blocks per image.
    """

    def __init__(
        self,
        grid: int,
        pools: Sequence[int],
        target_scale: list[float],
        target_aspect: list[float],
        context_scale: list[float],
        blocks: int,
    ) -> None:
        super().__init__(grid, pools)
        check_range("target_scale", target_scale, 0, 1)
        check_range("context_scale", context_scale, 0, 1)
        check_range("target_aspect", target_aspect, 0, math.inf)
        if blocks < 1:
            raise UserError(f"masking.blocks={blocks}: at least one target block is needed.")
        room = (1 - self.align**2 / self.patches) / blocks  # a share that leaves a cell to see, wherever the blocks lie
        self.target_scale = [target_scale[0], max(target_scale[0], min(target_scale[1], room))]
        self.target_aspect, self.context_scale, self.blocks = target_aspect, context_scale, blocks
        largest = max_area(self.target_scale[1], target_aspect, grid, self.align)
        self.floor = self.check_context_left(blocks * largest, f"{blocks} target blocks of up to {largest} patches")

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        area = uniform(self.target_scale, generator) * self.patches
        most = self.target_scale[1] * self.patches
        sides = block_sides(area, log_uniform(self.target_aspect, generator), self.grid, self.align, most)
        blocks = place_blocks((batch_size, 1, self.blocks), sides, self.grid, self.align, generator)
        block = block_sides(uniform(self.context_scale, generator) * self.patches, 1.0, self.grid)
        wanted = mark(place_blocks((batch_size,), block, self.grid, 1, generator), self.patches)
        context = self.context_beside(mark(blocks, self.patches), wanted, self.floor, generator)
        return Masks(context, tuple(place_cells(blocks, sides, self.grid, pool) for pool in self.pools))


class HierarchicalMasking(MaskSampler):
    """Multi-block masking with a block size of its own per level: coarser levels predict larger regions.

    Args:
        target_scale: one [smallest, largest] share of patches per level (the last serves all further levels).
        target_aspect, context_scale: as in `MultiblockMasking`; blocks: target blocks per image and level.
    """

    def __init__(
        self,
        grid: int,
        pools: Sequence[int],
        target_scale: list[list[float]],
        target_aspect: list[float],
        context_scale: list[float],
        blocks: list[int],
    ) -> None:
        super().__init__(grid, pools)
        check_range("context_scale", context_scale, 0, 1)
        check_range("target_aspect", target_aspect, 0, math.inf)
        for scale in target_scale:
            check_range("target_scale", scale, 0, 1)
        if not target_scale or not blocks or min(blocks) < 1:
            raise UserError(f"masking.target_scale={target_scale} and masking.blocks={blocks} need an entry per level.")
        self.scales = [target_scale[min(i, len(target_scale) - 1)] for i in range(len(self.pools))]
        self.blocks = [blocks[min(i, len(blocks) - 1)] for i in range(len(self.pools))]
        self.target_aspect, self.context_scale = target_aspect, context_scale
        covered = sum(
            count * max_area(scale[1], target_aspect, grid, pool)
            for count, scale, pool in zip(self.blocks, self.scales, self.pools, strict=True)
        )
        self.floor = self.check_context_left(covered, "The target blocks of all levels")

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        targets, covered = [], torch.zeros(batch_size, self.patches, dtype=torch.bool)
        for pool, scale, count in zip(self.pools, self.scales, self.blocks, strict=True):
            area = uniform(scale, generator) * self.patches
            most = scale[1] * self.patches
            sides = block_sides(area, log_uniform(self.target_aspect, generator), self.grid, pool, most)
            blocks = place_blocks((batch_size, 1, count), sides, self.grid, pool, generator)
            targets.append(place_cells(blocks, sides, self.grid, pool))
            covered |= mark(blocks, self.patches)
        block = block_sides(uniform(self.context_scale, generator) * self.patches, 1.0, self.grid)
        wanted = mark(place_blocks((batch_size,), block, self.grid, 1, generator), self.patches)
        return Masks(self.context_beside(covered, wanted, self.floor, generator), tuple(targets))


def max_area(scale: float, aspect: Sequence[float], grid: int, align: int) -> int:
    """The largest block, in patches, that a sampler can draw for this scale and range of aspects.

    Found by trying a dense set of aspects and areas.
    """
    steps = 4 * grid + 1
    low, high = math.log(aspect[0]), math.log(min(aspect[1], 1e6))
    aspects = [math.exp(low + (high - low) * i / (steps - 1)) for i in range(steps)]
    areas = [s * scale * grid * grid / 32 for s in range(1, 33)]
    return max(math.prod(block_sides(area, a, grid, align, areas[-1])) for a in aspects for area in areas)


class CellMaskSampler(MaskSampler):
    """Samplers that choose among the coarsest level's cells, so that any choice suits every level."""

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        super().__init__(grid, pools)
        self.cells = (grid // self.align) ** 2

    def masks(self, context: Tensor, targets: Tensor) -> Masks:
        """Masks from coarsest cells: context [B, C, Kc] and targets [B, C, Tc]; one target block per context."""
        patches = cells_to_patches(targets, self.grid, self.align).sort(-1).values
        levels = []
        for pool in self.pools:
            side = self.grid // pool
            corner = (patches // self.grid % pool == 0) & (patches % self.grid % pool == 0)
            chosen = patches[corner].view(*patches.shape[:2], 1, -1)
            levels.append(chosen // self.grid // pool * side + chosen % self.grid // pool)
        return Masks(cells_to_patches(context, self.grid, self.align).sort(-1).values, tuple(levels))


class RandomMasking(CellMaskSampler):
    """Uniformly random targets, everything else is context (MAE's masking, He et al. 2022).

    Args:
        target_share: share of the cells that is predicted.
        contexts: independent choices per image; the teacher's pass is shared by them.
    """

    def __init__(self, grid: int, pools: Sequence[int], target_share: float, contexts: int) -> None:
        super().__init__(grid, pools)
        self.count, self.contexts = round(target_share * self.cells), contexts
        if not 0 < self.count < self.cells or contexts < 1:
            raise UserError(
                f"masking.target_share={target_share} of {self.cells} cells with masking.contexts={contexts} must leave at "
                "least one cell to see and one to predict, for at least one context."
            )

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        order = torch.rand(batch_size, self.contexts, self.cells, generator=generator).argsort(-1)
        return self.masks(order[..., self.count :], order[..., : self.count])


class InverseBlockMasking(CellMaskSampler):
    """Inverse block masking (data2vec 2.0, Baevski et al. 2022): one contiguous context block, the rest is predicted.

    Args:
        context_scale: range of the context's share of patches; context_aspect: range of height / width.
        contexts: context blocks per image; the teacher's pass is shared by them.
    """

    def __init__(
        self, grid: int, pools: Sequence[int], context_scale: list[float], context_aspect: list[float], contexts: int
    ) -> None:
        super().__init__(grid, pools)
        check_range("context_scale", context_scale, 0, 1)
        check_range("context_aspect", context_aspect, 0, math.inf)
        if contexts < 1:
            raise UserError(f"masking.contexts={contexts}: at least one context is needed.")
        largest = max_area(context_scale[1], context_aspect, grid // self.align, 1)
        if largest >= self.cells:
            raise UserError(
                f"masking.context_scale={list(context_scale)} can cover the whole {grid}x{grid} grid and leave nothing to "
                "predict; use a smaller share, smaller patches or larger images."
            )
        self.context_scale, self.context_aspect, self.contexts = context_scale, context_aspect, contexts

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        side = self.grid // self.align
        area = uniform(self.context_scale, generator) * self.cells
        most = self.context_scale[1] * self.cells
        sides = block_sides(area, log_uniform(self.context_aspect, generator), side, most=most)
        context = place_blocks((batch_size, self.contexts), sides, side, 1, generator)
        seen = mark(context.flatten(0, 1), self.cells).view(batch_size, self.contexts, self.cells)
        return self.masks(context, draw(-seen.float(), self.cells - context.shape[-1]))


class PartitionMasking(CellMaskSampler):
    """Parallel JEPA's partition: cells are shuffled into equal parts; each part alone predicts all the others.

    Args:
        num_parts: parts per image (the C of the masks).
    """

    def __init__(self, grid: int, pools: Sequence[int], num_parts: int) -> None:
        super().__init__(grid, pools)
        if num_parts < 2 or self.cells % num_parts:
            raise UserError(
                f"masking.num_parts={num_parts} does not divide the {self.cells} cells of the coarsest level into at least "
                "two equal parts; use a divisor."
            )
        self.num_parts = num_parts

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        order = torch.rand(batch_size, self.cells, generator=generator).argsort(-1)
        parts = order.view(batch_size, self.num_parts, -1)
        others = [torch.cat([parts[:, j] for j in range(self.num_parts) if j != i], dim=1) for i in range(self.num_parts)]
        return self.masks(parts, torch.stack(others, dim=1))


class NoMasking(CellMaskSampler):
    """The student sees every patch and predicts none: for `levels=none`."""

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        super().__init__(grid, pools)
        if pools:
            raise UserError("masking=none leaves nothing to predict; it goes with levels=none only.")

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        return Masks(torch.arange(self.patches).expand(batch_size, 1, -1), ())
