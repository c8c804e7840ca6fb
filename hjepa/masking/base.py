"""Mask samplers: which patches the student sees, and which cells of every level it has to predict.

The trainer builds one sampler for the patch grid and the levels' pools, and calls it once per batch as
`sampler(batch_size, generator) -> Masks`. The masks then select the student's input in the encoder, and the queries and
targets in the predictor. Every sampler keeps to this contract:

- All images of a batch have equally many context patches and targets, so that there is no padding.
- Context and targets are disjoint, and indices are sorted.
- The cells of a pooled level contain target patches only.
- Sampling is vectorized over the batch, never retries, and runs on the CPU from the generator that is passed.

To add a strategy, write a subclass of `MaskSampler` (or of `CellMaskSampler`) and a file in conf/masking/ that names it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Generator, Tensor

from hjepa.distributed.device import to_device


@dataclass(frozen=True)
class Masks:
    """Indices of the visible patches and of the cells to predict, for B images with C contexts each.

    Attributes:
        context: Indices of the K visible patches of each context, ascending, in raster order of the patch grid.
        targets: For each level, the indices of the cells to predict: P blocks of T cells per context, in raster order of the grid
            of cells of the level. P and T may differ between levels.
        stacked: Masks of the stacked levels, on their own grids.
    """

    context: Int64[Tensor, "b c k"]
    targets: tuple[Int64[Tensor, "b c _ _"], ...]
    stacked: tuple["Masks", ...] = ()

    def to(self, device: torch.device) -> "Masks":
        """Return the masks on a device."""
        targets = tuple(to_device(target, device) for target in self.targets)
        return Masks(to_device(self.context, device), targets, tuple(masks.to(device) for masks in self.stacked))

    def select(self, rows: Int64[Tensor, " n"]) -> "Masks":
        """Return the masks of some images of the batch."""
        targets = tuple(target[rows] for target in self.targets)
        return Masks(self.context[rows], targets, tuple(masks.select(rows) for masks in self.stacked))

    def split(self, num_chunks: int) -> list["Masks"]:
        """Split the batch into consecutive chunks of equal size."""
        targets = list(zip(*(target.chunk(num_chunks) for target in self.targets), strict=True)) or [()] * num_chunks
        stacked = list(zip(*(masks.split(num_chunks) for masks in self.stacked), strict=True)) or [()] * num_chunks
        return [Masks(*chunk) for chunk in zip(self.context.chunk(num_chunks), targets, stacked, strict=True)]


class MaskSampler(ABC):
    """Base class of all mask samplers.

    Args:
        grid: Number of patches along a side of the image.
        pools: For each level, the side of its cells in patches.

    Attributes:
        num_patches: Number of patches of an image.
        coarsest_pool: Side of the coarsest level's cells in patches.
        num_contexts: Number of contexts per image, the C of the masks.
        hides_patches: False if every context is the whole image.
    """

    num_contexts = 1
    hides_patches = True

    def __init__(self, grid: int, pools: Sequence[int]) -> None:
        self.grid, self.pools, self.num_patches = grid, tuple(pools), grid * grid
        self.coarsest_pool = max(self.pools, default=1)

    @abstractmethod
    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        """Return masks for `batch_size` images. Random numbers come from `generator`, which is on the CPU."""
