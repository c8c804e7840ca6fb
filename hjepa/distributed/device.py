"""The device of a run: precision, threads, compilation. Of these options, only `precision` changes the result of a run."""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hjepa.config.errors import UserError
from hjepa.config.types import PositiveInt
from hjepa.distributed.process_group import World
from hjepa.distributed.resources import num_cores

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_available(device: str) -> bool:
    """Return whether this machine has a device of a type."""
    if device == "cuda":
        return torch.cuda.is_available()
    return device == "cpu" or (device == "mps" and torch.backends.mps.is_available())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; a CUDA GPU does not wait for the copy.

    CUDA reads pageable memory before the call returns. Apple's GPUs read it later, when it may have been freed and used again
    (https://github.com/pytorch/pytorch/issues/189690), so that the call waits for them.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def has_fast_bfloat16(device: str) -> bool:
    """Return whether a device has instructions for bfloat16.

    x86 processors without them compute several times slower in bfloat16 than in float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def tune_malloc(largest: int) -> None:
    """Let glibc reuse freed memory instead of returning it to the system; does nothing with other C libraries.

    Activations are large, and mapping their memory anew in every step takes longer than computing them on some machines.

    Args:
        largest: Size in bytes of the largest tensor whose memory is kept. Kept memory is fragmented: the larger the tensors, the
            more of it lies idle.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, largest)
        libc.mallopt(trim_threshold, 2**31 - 1)


class FloatAttention(TorchFunctionMode):
    """Compute attention in float32, because its backward pass on a CPU takes several times as long in bfloat16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), **(kwargs or {}))


@contextmanager
def recomputation(block: nn.Module, precision: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter the state in which the backward pass computes the output of a block again.

    The running statistics of batch norms have been updated already, and stay as they are.

    Args:
        block: The block.
        precision: Returns the context manager of the precision. Autograd restores autocast by itself, but not a
            `TorchFunctionMode` such as `FloatAttention`.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else torch.zeros_like(count)
    try:
        with precision():
            yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def recompute_in_backward(
    forward: Callable[..., Tensor], context: Callable[[], AbstractContextManager[Any]], *inputs: Tensor
) -> Tensor:
    """Call a function without keeping its activations: the backward pass computes them again.

    Args:
        forward: The function, usually the `forward` method of a module.
        context: Returns the context manager of the recomputation.
        inputs: The arguments of the function.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs)
    contexts = lambda: (nullcontext(), context())  # noqa: E731  # of the forward pass and of the recomputation
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


class Hardware:
    """A device and the way in which it is used.

    Args:
        device: Type of the device; "auto" takes the first of cuda, mps and cpu that this machine has.
        precision: Precision of the forward pass; "auto" is bfloat16 autocast if `has_fast_bfloat16`, and float32 otherwise.
        threads: Number of CPU threads per process; None divides the available cores among the processes on this machine.
        processes: Number of processes that share every batch (data parallel); None starts one per GPU.
        shard: Whether to shard the model over the processes (FSDP2) instead of copying it; see `hjepa.training.parallel`.
        slots: Number of jobs of a sweep that run on this machine at a time; see `hjepa.sweeps`.
        compile: Whether to compile the blocks of the networks (of transformers, or convolutional stages) with `torch.compile`.
        activation_checkpointing: Whether to recompute all blocks in the backward pass, to save memory.
    """

    def __init__(
        self,
        device: Literal["auto", "cpu", "mps", "cuda"],
        precision: Literal["auto", "float32", "bfloat16", "float16"],
        threads: PositiveInt | None,
        processes: PositiveInt | None,
        shard: bool,
        slots: PositiveInt,
        compile: bool,
        activation_checkpointing: bool,
    ) -> None:
        available = [name for name in ("cuda", "mps", "cpu") if is_available(name)]
        chosen: str = available[0] if device == "auto" else device
        if chosen not in available:
            raise UserError(
                f"hardware.device={device}: this machine has no {device} device (it has {', '.join(available)}); "
                "use hardware=auto or hardware=cpu."
            )
        if precision == "auto":
            precision = "bfloat16" if has_fast_bfloat16(chosen) else "float32"
        if precision == "float16" and chosen == "cpu":
            raise UserError("hardware.precision=float16 needs a GPU; use float32 or bfloat16 on a CPU.")
        self.device, self.precision = torch.device(chosen), precision
        self.threads, self.processes, self.slots = threads, 1, slots
        self.shard = shard
        self.compile, self.activation_checkpointing = compile, activation_checkpointing

    def prepare(self, world: World) -> None:
        """Set the device, threads, matmul precision and, on a CPU, memory allocation of this process."""
        if self.device.type == "cuda":
            self.device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.processes = world.size
        self.threads = self.threads or max(1, num_cores() // (world.local_size * self.slots))
        torch.set_num_threads(self.threads)
        if self.device.type == "cpu":
            tune_malloc(2**24 if self.activation_checkpointing else 2**30)
        torch.set_float32_matmul_precision("high" if self.device.type == "cuda" else "highest")

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Enter the precision of the forward pass."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32), self.attention():
            yield

    def attention(self) -> AbstractContextManager[Any]:
        """Return a context with the precision of attention where that differs from `precision`."""
        return FloatAttention() if self.device.type == "cpu" and self.precision == "bfloat16" else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, which is enabled for float16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def prepare_model(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Move a model to the device; compile its blocks and recompute them in the backward pass if configured to.

        Args:
            model: The model.
            blocks: The repeated modules of the model. They are compiled and recomputed one by one. The modules are changed in
                place, and their parameters keep their names.
        """
        drops_paths = any(isinstance(module, DropPath) and module.drop_prob for module in model.modules())
        if self.device.type == "mps" and self.activation_checkpointing and drops_paths:
            raise UserError(
                "hardware.activation_checkpointing=true cannot drop the same paths again on Apple's GPUs; set "
                "model.encoder.drop_path=0, or leave activation checkpointing out."
            )
        model.to(self.device)
        for block in blocks:
            if self.compile:
                block.forward = torch.compile(block.forward, dynamic=True)
            if self.activation_checkpointing:
                block.forward = partial(recompute_in_backward, block.forward, partial(recomputation, block, self.attention))

    def describe(self) -> str:
        """Return the device, the precision and the number of threads in words."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        times = f"{self.processes} processes of " if self.processes > 1 else ""
        return f"{times}{name}, {self.precision}, {self.threads} CPU threads"

    def peak_memory_mb(self) -> float:
        """Return the peak memory of this process in MB: GPU memory with CUDA, resident memory otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
