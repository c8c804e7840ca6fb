"""Activation checkpointing: less memory for more time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Recomputing(nn.Module):
    """A part that can forget what its blocks computed, and compute it again in the backward pass.

    `checkpoint` calls a block and keeps none of its activations; None keeps them.
    """

    checkpoint: Callable[..., Tensor] | None = None

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """What the block makes of the inputs."""
        if self.checkpoint and torch.is_grad_enabled():
            return self.checkpoint(block, *inputs)
        output: Tensor = block(*inputs)
        return output
