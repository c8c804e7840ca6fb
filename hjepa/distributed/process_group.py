"""Data parallel training: several processes that share the batches of one run.

Every process samples the random numbers of a step for the whole batch, and computes only its own share of the images.
Statistics over the batch are taken over all processes. N processes with B / N images each are therefore equal to one process
with B images, up to rounding and, with stochastic depth, its random numbers. Only the main process, rank 0, evaluates and
writes. `hjepa.distributed.launch` starts the processes.
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

EVALUATION_TIMEOUT = timedelta(days=1)  # the other processes wait while the main one evaluates; a dead one is noticed at once


@dataclass(frozen=True)
class World:
    """The place of this process among the processes of the run.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        local_rank: Number of this process among those of this machine.
        local_size: Number of processes on this machine.
        cpu_group: Process group for messages on the CPU, apart from the gradients; None for a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cpu_group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that evaluates and writes."""
        return self.rank == 0

    def rows(self, batch_size: int, num_parts: int) -> Tensor | None:
        """Return the positions in a batch of the images that this process computes.

        Args:
            batch_size: Number of images in the batch.
            num_parts: Number of parts in which the batch is computed (gradient accumulation); this process has a share of each.

        Returns:
            int64 [batch_size / size], or None for all images.
        """
        if self.size == 1:
            return None
        return torch.arange(batch_size).view(num_parts, self.size, -1)[:, self.rank].flatten()

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Return the mean of the values of all processes."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all processes, ordered by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def broadcast_object(self, value: T) -> T:
        """Return the value of the main process."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self.cpu_group)
        return values[0]


class AsyncConsensus:
    """Find out whether any process raised a flag.

    The answer to one call is returned by the next, so that no training step waits for other processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Send the flags of this process, and return whether any process raised each flag at the previous call.

        A single process gets its own flags back at once.
        """
        if self.world.size == 1:
            return list(flags)
        previous = self.settle() or [False] * len(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.world.cpu_group, async_op=True)
        self.pending = work, values
        return previous

    def settle(self) -> list[bool]:
        """Wait for the answer to the last call; empty if it was already returned."""
        if self.pending is None:
            return []
        work, values = self.pending
        work.wait()
        self.pending = None
        return [bool(value) for value in values]


def init_process_group(cuda: bool) -> World:
    """Initialize the process group from the environment variables of torchrun (RANK, WORLD_SIZE, ...), if they are set.

    Args:
        cuda: Whether the gradients are on GPUs, which communicate through NCCL.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if size == 1:
        return World()
    if rank:
        logging.getLogger("hjepa").setLevel(logging.WARNING)  # the main process logs for all
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(rank, size, local_rank, local_size, dist.new_group(backend="gloo", timeout=EVALUATION_TIMEOUT))


def destroy_process_group() -> None:
    """Destroy the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class AllGather(torch.autograd.Function):
    """Concatenate the tensors [B, ...] of N processes to [N * B, ...].

    The gradient of a tensor is the sum over all processes, because each of them used it. The same function of
    torch.distributed.nn is deprecated.
    """

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(tensors, tensor.contiguous())
        return torch.cat(tensors)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather_with_grad(features: Tensor) -> Tensor:
    """Return the features [B, ...] of all N processes as [N * B, ...]; gradients flow back to every process."""
    gathered: Tensor = AllGather.apply(features) if dist.is_initialized() else features
    return gathered


@torch.no_grad()
def all_gather(values: Tensor) -> Tensor:
    """Return the values [B, ...] of all N processes as [N * B, ...], without gradients."""
    if not dist.is_initialized():
        return values
    sent = values.to(torch.uint8) if values.dtype == torch.bool else values  # not every backend sends truth values
    gathered: Tensor = AllGather.apply(sent)
    return gathered.to(values.dtype)


def broadcast_from_main(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of the main process, and return it."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)
    return values
