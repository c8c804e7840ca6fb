"""What of a model is looked at: the teacher's features at the depth of every level, and those of the levels stacked on it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hjepa.encoder import Encoder
from hjepa.levels import pool_cells
from hjepa.opened import Opened
from hjepa.stacked import Upper

Who = Literal["trained", "untrained"]
WHO: tuple[Who, Who] = ("trained", "untrained")


@dataclass(frozen=True)
class Tokens:
    """What a layer says of B images: `cells` [B, side^2, D] in raster order, and `pooled` [B, F] as the probes see them."""

    cells: Tensor
    pooled: Tensor


class Network:
    """An encoder and the teachers stacked on it, trained or not.

    Args:
        depths: ascending numbers of blocks after which the encoder is looked at, the last one its depth.
    """

    def __init__(self, encoder: Encoder, upper: Upper | None, depths: list[int]) -> None:
        self.encoder, self.depths = encoder, depths
        self.stages = upper.stages() if upper else []

    def names(self) -> list[str]:
        """The layers, the encoder's last block first, then its other depths, then the stacked levels."""
        return [*(f"block {d}" for d in reversed(self.depths)), *(f"stacked {i + 1}" for i in range(len(self.stages)))]

    def look(self, images: Tensor) -> dict[str, Tokens]:
        """All layers' tokens of float images [B, 3, S, S], by name, on the CPU."""
        return {name: Tokens(t.cells.float().cpu(), t.pooled.float().cpu()) for name, t in self.tokens(images).items()}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> dict[str, Tokens]:
        """The same where the images are."""
        states = dict(zip(self.depths, self.encoder(images, depths=self.depths), strict=True))
        s = self.encoder.summary_tokens
        layers = {d: Tokens(states[d][:, s:], self.encoder.pooled(states[d])) for d in reversed(self.depths)}
        found = list(layers.values())
        below = layers[self.encoder.depth].cells
        for stage in self.stages:
            below = stage.teacher(pool_cells(below, stage.grid, stage.pool))
            found.append(Tokens(below, below.mean(1)))
        return dict(zip(self.names(), found, strict=True))

    def blocks(self, name: str) -> tuple[list[Any], int]:
        """The transformer blocks that lead to a layer, and how many summary tokens pass through them with its cells."""
        kind, number = name.split()
        if kind == "block":
            return list(self.encoder.blocks)[: int(number)], self.encoder.summary_tokens
        return list(self.stages[int(number) - 1].teacher.blocks), 0


def networks(run: Opened, depths: list[int]) -> dict[Who, Network]:
    """The trained and the untrained network of a run, to be looked at at these depths."""
    pairs = ((run.encoder, run.model.upper), (run.untrained, run.untrained_upper))
    return {who: Network(*pair, depths) for who, pair in zip(WHO, pairs, strict=True)}
