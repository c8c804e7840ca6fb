"""Several processes, one run (data parallel): which one this is, its share of every batch, what they tell one another.

Every draw of a step is made for the whole batch in every process, each then computes its own images, and statistics over the
batch are taken over all processes: N processes with B / N images each are one process with B, up to rounding. The main
process, rank 0, alone measures and writes. `hjepa.distributed.launch` says where the processes come from.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # how long the others wait while the main process measures; a dead one is noticed at once


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Args:
        rank: its number; size: how many there are; local_rank, local_size: the same on this machine.
        side: a group for messages on the CPU, apart from the gradients; None for a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    side: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that measures and writes."""
        return self.rank == 0

    def rows(self, batch: int, parts: int) -> Tensor | None:
        """Positions in a batch of the images that this process computes, its share of each of the parts that the batch is
        computed in; None for all.
        """
        return None if self.size == 1 else torch.arange(batch).view(parts, self.size, -1)[:, self.rank].flatten()

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """The mean over all processes; waits for them."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def all_gather_object(self, thing: T) -> list[T]:
        """What all processes have, by rank; waits for them."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing, group=self.side)
        return things

    def broadcast_object(self, thing: T) -> T:
        """What the main process has, for all of them; waits for it."""
        if self.size == 1:
            return thing
        box: list[Any] = [thing]
        dist.broadcast_object_list(box, src=0, group=self.side)
        return box[0]


class AsyncConsensus:
    """Whether any process wants something, known at the next call: no step waits for the answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, *wishes: bool) -> list[bool]:
        """What was wished for at the last call; a process alone gets its own wishes at once."""
        if self.world.size == 1:
            return list(wishes)
        before = self.settle() or [False] * len(wishes)
        flags = torch.tensor(wishes, dtype=torch.int32)
        self.pending = (dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.world.side, async_op=True), flags)
        return before

    def settle(self) -> list[bool]:
        """Wait for the last call's answer and forget it."""
        if self.pending is None:
            return []
        work, flags = self.pending
        work.wait()
        self.pending = None
        return [bool(flag) for flag in flags]


def init_process_group(cuda: bool) -> World:
    """Meet the other processes that the environment speaks of, as torchrun does (RANK, WORLD_SIZE, ...), if any."""
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if size == 1:
        return World()
    if rank:
        logging.getLogger("hjepa").setLevel(logging.WARNING)  # the main process speaks for all
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(rank, size, local_rank, local_size, dist.new_group(backend="gloo", timeout=PATIENCE))


def destroy_process_group() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


class AllGather(torch.autograd.Function):
    """All processes' tensors [B, ...] as one [N * B, ...]; a tensor's gradient is the sum over all processes that used it."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather_with_grad(features: Tensor) -> Tensor:
    """The features [B, ...] of all processes, [N * B, ...]; gradients flow to each one's own."""
    gathered: Tensor = AllGather.apply(features) if dist.is_initialized() else features
    return gathered


def broadcast_from_main(values: Tensor) -> Tensor:
    """The main process' values, in all of them."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)
    return values
