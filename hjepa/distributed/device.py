"""Where a run computes: device, precision, threads, compilation. The result of a run depends on `precision` alone."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hjepa.config.errors import UserError
from hjepa.distributed.process_group import World
from hjepa.distributed.resources import num_cores
from hjepa.models.layers import Recomputing

if TYPE_CHECKING:
    from hjepa.models.hjepa import HJEPA


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available(device: str) -> bool:
    """Whether this machine has the device."""
    if device == "cuda":
        return torch.cuda.is_available()
    return device == "cpu" or (device == "mps" and torch.backends.mps.is_available())


def has_fast_bfloat16(device: str) -> bool:
    """Whether this machine's device has instructions for it; x86 processors without them take several times as long in it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def tune_malloc(largest: int) -> None:
    """Let glibc reuse freed memory instead of returning it to the system: activations are large, and mapping them anew in
    every step costs more than computing them on some machines. Elsewhere (musl, macOS) nothing happens.

    Args:
        largest: bytes that a tensor is kept up to. What is kept is in pieces, and the larger they are, the more lies idle.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, largest)
        libc.mallopt(trim_threshold, 2**31 - 1)


class FloatAttention(TorchFunctionMode):
    """Attention in float32: on a CPU its backward pass takes several times as long in bfloat16."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), **(kwargs or {}))


class Hardware:
    """A device and how to use it.

    Args:
        device: "auto" takes the first of cuda, mps, cpu that is there.
        precision: "auto" is bfloat16 autocast where the device multiplies in it (`has_fast_bfloat16`), float32 elsewhere.
        threads: CPU threads of a process; None shares the cores that this process may run on among all processes here.
        processes: that share every batch (data parallel), None for one per GPU; see `hjepa.distributed.launch`.
        shard: divide the model among the processes instead of giving each a copy (FSDP2), see `hjepa.training.parallel`.
        slots: jobs of a sweep that run on this machine at a time; see `hjepa.sweeps.local`.
        compile: compile the transformer blocks with torch.compile.
        activation_checkpointing: recompute all blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        device: Literal["auto", "cpu", "mps", "cuda"],
        precision: Literal["auto", "float32", "bfloat16", "float16"],
        threads: int | None,
        processes: int | None,
        shard: bool,
        slots: int,
        compile: bool,
        activation_checkpointing: bool,
    ) -> None:
        if device == "auto":
            device = next(d for d in ("cuda", "mps", "cpu") if available(d))
        if not available(device):
            there = [d for d in ("cuda", "mps", "cpu") if available(d)]
            raise UserError(
                f"hardware.device={device}: this machine has no {device} device (it has {', '.join(there)}); "
                "use hardware=auto or hardware=cpu."
            )
        if precision == "auto":
            precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
        if precision == "float16" and device == "cpu":
            raise UserError("hardware.precision=float16 needs a GPU; use float32 or bfloat16 on a CPU.")
        if threads is not None and threads < 1:
            raise UserError(f"hardware.threads={threads}: expected at least 1, or null for all cores.")
        self.device, self.precision = torch.device(device), precision
        self.threads, self.processes, self.slots = threads, 1, slots
        self.shard = shard
        self.compile, self.activation_checkpointing = compile, activation_checkpointing

    def prepare(self, world: World) -> None:
        """Set this process' device, threads, matmul precision and, on a CPU, memory allocation."""
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
        """The precision of the forward pass."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32), self.attention():
            yield

    def attention(self) -> AbstractContextManager[Any]:
        """The precision of attention, where it is another one."""
        return FloatAttention() if self.device.type == "cpu" and self.precision == "bfloat16" else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, active for float16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def place(self, model: "HJEPA") -> None:
        """Move the model here and switch on what was asked for."""
        model.to(self.device)
        if self.activation_checkpointing:
            recompute = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self.attention()))
            for part in model.modules():
                if isinstance(part, Recomputing):
                    part.checkpoint = recompute
        if self.compile:
            for block in model.blocks():
                block.compile(dynamic=True)

    def describe(self) -> str:
        """Device, precision and threads in words."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        times = f"{self.processes} processes of " if self.processes > 1 else ""
        return f"{times}{name}, {self.precision}, {self.threads} CPU threads"

    def peak_memory_mb(self) -> float:
        """Most memory this process has held: on the GPU for CUDA, resident otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
