"""Means of the loss terms over a log interval and over an epoch, kept on the device until they are read."""

from typing import Any

import torch
from torch import Tensor

from hjepa.distributed.process_group import World

Terms = dict[str, Tensor]


class Meter:
    """Collects a row of detached terms per step; memory is bounded by the log interval.

    Args:
        world: the processes that means are taken over.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.names: list[str] = []
        self.rows: list[Tensor] = []
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, terms: Terms) -> None:
        """Add one step's terms."""
        self.names = list(terms)
        row = torch.stack([value.detach() for value in terms.values()])
        self.rows.append(row)
        self.sum = row.clone() if self.sum is None else self.sum + row
        self.count += 1

    def first_bad(self) -> int | None:
        """How many steps ago (0: the last one) the first step of the interval was that is not finite, None if all are."""
        if not self.rows:
            return None
        bad = (~torch.stack(self.rows).isfinite().all(1)).nonzero()
        return len(self.rows) - 1 - int(bad[0]) if len(bad) else None

    def interval(self) -> dict[str, float]:
        """Means since the last call, by name."""
        means = self.world.all_reduce_mean(torch.stack(self.rows).mean(0)).tolist() if self.rows else []
        self.rows = []
        return dict(zip(self.names, means, strict=bool(means)))

    def epoch(self) -> dict[str, float]:
        """Means over all steps since the last call, by name."""
        means = self.world.all_reduce_mean(self.sum / self.count).tolist() if self.sum is not None else []
        self.sum, self.count = None, 0
        return dict(zip(self.names, means, strict=bool(means)))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the means over all processes, which stand for each of them later."""
        rows = [self.world.all_reduce_mean(row) for row in self.rows]
        total = None if self.sum is None else self.world.all_reduce_mean(self.sum)
        return {"names": self.names, "rows": rows, "sum": total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.names, self.rows, self.sum, self.count = (state[key] for key in ("names", "rows", "sum", "count"))
