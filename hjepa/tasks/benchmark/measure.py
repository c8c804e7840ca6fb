"""Training steps, measured: their phases, their arithmetic, and the machine's own rate, in turns so that both see the same
machine. Every process of a run measures its share; `hjepa.tasks.benchmark.benchmark` puts the shares together.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hjepa.data.stream import Stream
from hjepa.distributed.device import PRECISIONS, Hardware
from hjepa.tasks.benchmark.phase_timer import PHASES, PhaseTimer, attach_phase_timer
from hjepa.training.trainer import Trainer

SMALL = 2  # images of a step that costs little more than any batch does

TURNS = 5  # of such a step and a whole one


@dataclass(frozen=True)
class Figures:
    """What one process measured.

    Attributes:
        step_seconds, phase_seconds: of a step, medians, waiting for images included.
        fixed: the share of a step's computing that is the same for any batch; None where the batch is too small to tell.
        flop: floating-point operations of this process' share of a step's matrix products, convolutions and attention.
        matmul_flops: FLOP/s of matrix products.
        decoded: images per second that the processes which decode streamed images deliver on their own, or None.
        peak_memory_mb: see `Hardware.peak_memory_mb`.
    """

    step_seconds: float
    phase_seconds: dict[str, float]
    fixed: float | None
    flop: int
    matmul_flops: float
    decoded: float | None
    peak_memory_mb: float


class Product:
    """A product of two square matrices in the precision of the forward pass, to measure the machine by."""

    def __init__(self, hardware: Hardware) -> None:
        side = 8192 if hardware.device.type == "cuda" else 2048  # a small one would measure its launch on a fast GPU
        kind = {"device": hardware.device, "dtype": PRECISIONS[hardware.precision]}
        self.a, self.b, self.out = (torch.randn(side, side, **kind) for _ in range(3))  # type: ignore[call-overload]
        self.flop = 2 * side**3
        self()

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.out)


def steps_needed(warmup: int, steps: int) -> int:
    """The length of a plan that `measure` can be carried out in."""
    return warmup + 2 + 4 * steps


def measure(trainer: Trainer, warmup: int, steps: int) -> Figures:
    """Measure `steps` ordinary training steps after `warmup` others."""
    for step in range(warmup):
        trainer.train_step(*trainer.batch(step), step)
    flop = count_flop(trainer, warmup)
    peak = trainer.parts.hardware.peak_memory_mb()
    product, clock = Product(trainer.parts.hardware), PhaseTimer(trainer.device)
    attach_phase_timer(trainer, clock)
    for step in progress(trainer, range(warmup + 1, warmup + 1 + steps)):
        clock.begin("matmul")
        product()
        clock.enter("augment")
        trainer.train_step(*trainer.batch(step), step)
    rounds = clock.read()
    products = [seconds.pop("matmul") for seconds in rounds]
    step_seconds, next_step = median(sum(seconds.values()) for seconds in rounds), warmup + 1 + steps
    phases = {phase: median(seconds.get(phase, 0.0) for seconds in rounds) for phase in PHASES}
    return Figures(
        step_seconds,
        {phase: seconds for phase, seconds in phases.items() if seconds},
        fixed_share(trainer, clock, next_step),
        flop,
        product.flop / median(products),
        decoding_rate(trainer, next_step + 1, steps),
        peak,
    )


def progress(trainer: Trainer, steps: range) -> Iterable[int]:
    """The steps, with a bar on the main process' terminal."""
    return tqdm(steps, desc="measuring", unit="step", disable=None if trainer.world.main else True)


def count_flop(trainer: Trainer, step: int) -> int:
    """FLOP of a step; blocks run as they are written, since compiled ones cannot be looked into."""
    torch.compiler.set_stance("force_eager")
    try:
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(*trainer.batch(step), step)
    finally:
        torch.compiler.set_stance("default")
    return counter.get_total_flops()


def fixed_share(trainer: Trainer, clock: PhaseTimer, step: int) -> float | None:
    """The share of a step that any batch costs: a line through the times of a few images and of all, at no image at all."""
    clock.begin("augment")
    batch = images, masks, crops = trainer.batch(step)
    views = trainer.parts.dataset.views
    count, few = len(images) // views, SMALL * trainer.accumulate
    if count < 2 * few:
        return None
    some = None if crops is None else crops[: few * len(crops) // count]
    small = images[: few * views], masks.select(torch.arange(few * views)), some
    trainer.train_step(*small, step)
    clock.read()
    for _ in range(TURNS):
        for chosen in (small, batch):
            clock.begin("other")
            trainer.train_step(*chosen, step)
    seconds = [sum(phases.values()) for phases in clock.read()]
    at_few, at_all = median(seconds[::2]), median(seconds[1::2])
    return min(1.0, max(0.0, (at_few * count - at_all * few) / (count - few) / at_all))


def decoding_rate(trainer: Trainer, first: int, steps: int) -> float | None:
    """Images per second that this process' workers decode while nothing else is done, None for images in memory. Some batches
    are decoded ahead, so a few measured steps do not show how long training would wait in the end.
    """
    if not isinstance(trainer.images, Stream):
        return None
    trainer.close()
    stream = Stream(trainer.images.files, trainer.indices, first + 3 * steps, trainer.device)
    begin, images = min(stream.workers, 2 * steps), 0  # the first batches wait for the workers to start
    for step in range(begin):
        stream.batch(first + step)
    began = time.perf_counter()
    for step in range(begin, 3 * steps):
        images += len(stream.batch(first + step))
    return images / (time.perf_counter() - began)
