"""A mask sampler outside hjepa, named by conf/masking/checkerboard.yaml."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator

from hjepa.masking import CellMaskSampler, Masks


class Checkerboard(CellMaskSampler):
    """Predict the cells of one color of a checkerboard from those of the other.

    The cells are those of the coarsest level, so that the choice suits every level.

    Args:
        grid: Number of patches along a side of the image; passed by hjepa.
        pools: Side of the cells of every level in patches; passed by hjepa.
        offset: Color of the cells that are predicted.
    """

    def __init__(self, grid: int, pools: Sequence[int], offset: Literal[0, 1]) -> None:
        super().__init__(grid, pools)
        self.offset = offset

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        """Return the same masks for every image; a random sampler would use the generator."""
        side = self.grid // self.coarsest_pool
        cells = torch.arange(self.num_cells)
        color = (cells // side + cells % side) % 2
        targets, context = (cells[color == c].expand(batch_size, 1, -1) for c in (self.offset, 1 - self.offset))
        return self.build_masks(context, targets)
