"""Fusion: the student's hidden states at several depths brought together before the predictor, top-down, with deep features
as the ground that shallower ones add detail to (a feature pyramid over depth, Lin et al. 2017). On the student's side only.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from hjepa.errors import UserError


class Fusion(nn.Module):
    """Tokens of one width from hidden states at several depths.

    Args:
        mode: "none" passes the last state on; "add" adds a linear map of every other state, normalised, which starts at zero;
            "concat" maps all of them, normalised and concatenated, to one.
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
        """States [M, S+K, D] by ascending depth, the last one normalised already -> [M, S+K, D]."""
        *shallow, last = states
        if self.mode == "none":
            return last
        normed = [norm(state) for norm, state in zip(self.norms, shallow, strict=True)]
        mixed: Tensor = self.mix(torch.cat(normed if self.mode == "add" else [last, *normed], dim=-1))
        return last + mixed if self.mode == "add" else mixed
