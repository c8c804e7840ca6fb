"""Means of the loss terms over a log interval and over an epoch."""

from typing import Any

import torch
from torch import Tensor

from hjepa.distributed.process_group import World

Terms = dict[str, Tensor]


class Meter:
    """Collects one row of detached loss terms per step; the rows stay on the device until their means are read.

    Args:
        world: Processes over which the means are taken.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.names: list[str] = []
        self.rows: list[Tensor] = []  # since the last call of `interval_means`
        self.sum: Tensor | None = None  # since the last call of `epoch_means`
        self.count = 0

    def add(self, terms: Terms) -> None:
        """Add the terms of one step."""
        self.names = list(terms)
        row = torch.stack([value.detach() for value in terms.values()])
        self.rows.append(row)
        self.sum = row.clone() if self.sum is None else self.sum + row
        self.count += 1

    def steps_since_nonfinite(self) -> int | None:
        """Return how many steps ago the first non-finite term of the interval occurred (0 is the last step), or None."""
        if not self.rows:
            return None
        nonfinite = (~torch.stack(self.rows).isfinite().all(1)).nonzero()
        return len(self.rows) - 1 - int(nonfinite[0]) if len(nonfinite) else None

    def interval_means(self) -> dict[str, float]:
        """Return the means since the last call by name."""
        means = self.world.all_reduce_mean(torch.stack(self.rows).mean(0)).tolist() if self.rows else []
        self.rows = []
        return dict(zip(self.names, means, strict=bool(means)))

    def epoch_means(self, keep: bool = False) -> dict[str, float]:
        """Return the means over all steps since the last call by name; `keep` lets the next call include these steps again."""
        means = self.world.all_reduce_mean(self.sum / self.count).tolist() if self.sum is not None else []
        if not keep:
            self.sum, self.count = None, 0
        return dict(zip(self.names, means, strict=bool(means)))

    def state_dict(self) -> dict[str, Any]:
        """Return the terms as means over all processes, which any number of processes can load."""
        rows = [self.world.all_reduce_mean(row) for row in self.rows]
        total = None if self.sum is None else self.world.all_reduce_mean(self.sum)
        return {"names": self.names, "rows": rows, "sum": total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state_dict`."""
        self.names, self.rows, self.sum, self.count = (state[key] for key in ("names", "rows", "sum", "count"))
