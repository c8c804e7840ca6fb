"""The output of `hjepa.models.HJEPA`, from which an objective computes its loss."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class LevelOutput:
    """The predictions and the targets of one level, for Q queries in each of G groups of each of B images.

    A group holds the queries whose targets lie in one view; all queries for hidden cells of the context's own view are one group.
    During training, a level holds the images of all processes if its loss is not a mean over images.

    Attributes:
        name: Name of the level in metrics.
        weight: Factor of the loss of the level.
        prediction: Predictions [B, G, Q, D].
        cells: Target cells [B, G, K, D]. Levels across views: all cells of the view, each once. Masked levels: the cells that the
            queries ask for, in their order; a cell that several contexts or blocks ask for is there several times.
        index: The cell [B, G, Q] that each query asks for; None if the queries ask for all cells in order.
        valid: True for queries [B, G, Q] that count; None if all of them do.
    """

    name: str
    weight: float
    prediction: Float[Tensor, "b g q d"]
    cells: Float[Tensor, "b g k d"]
    index: Int64[Tensor, "b g q"] | None = None
    valid: Bool[Tensor, "b g q"] | None = None

    @property
    def target(self) -> Float[Tensor, "b g q d"]:
        """The target of each query."""
        if self.index is None:
            return self.cells
        return self.cells.gather(2, self.index.unsqueeze(-1).expand(*self.index.shape, self.cells.shape[-1]))


@dataclass(frozen=True)
class Output:
    """The output of `HJEPA`.

    Attributes:
        levels: Predictions and targets of all levels.
        features: Pooled features of the student [B, V, F], one tensor per regularized level. The V views of an image are the
            contexts of its global crops, followed by its local crops. F is the width of the projector or, without one, of the
            pooled features.
        num_global: Number of views that are contexts of global crops.
    """

    levels: list[LevelOutput]
    features: list[Float[Tensor, "b v _"]]
    num_global: int = 1

    def zero(self) -> Float[Tensor, ""]:
        """Return a float32 zero on the device of the output, to which losses can be added."""
        some = self.features[0] if self.features else self.levels[0].prediction
        return some.new_zeros((), dtype=torch.float32)
