"""Measurements of training steps: phases, floating-point operations, and the matmul rate of the machine.

Steps and matrix products alternate, so that both are measured under the same conditions. Every process of a run measures its
own share of the steps; `hjepa.tasks.benchmark.benchmark` combines the measurements.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from hjepa.config.terminal import progress_bar
from hjepa.data.stream import Stream
from hjepa.distributed.device import PRECISIONS, Hardware
from hjepa.tasks.benchmark.phase_timer import PHASES, PhaseTimer, attach_phase_timer
from hjepa.training.batch import Batch
from hjepa.training.trainer import Trainer

SMALL_BATCH_SIZE = 2  # images of a step whose time is mostly overhead

NUM_COMPARISONS = 5  # alternating steps with a small and a full batch


@dataclass(frozen=True)
class StepMeasurements:
    """The measurements of one process.

    Attributes:
        step_seconds: Median time of a step, including the time it waits for images.
        phase_seconds: Median time of every phase.
        fixed_fraction: Fraction of the computing time that does not depend on the batch; None if the batch is too small to tell.
        flop: Floating-point operations of this process in the matrix products, convolutions and attention of a step.
        matmul_flops: FLOP/s of matrix products.
        decoded_per_second: Images per second that the decoding processes deliver on their own; None for images in memory.
        peak_memory_mb: See `Hardware.peak_memory_mb`.
    """

    step_seconds: float
    phase_seconds: dict[str, float]
    fixed_fraction: float | None
    flop: int
    matmul_flops: float
    decoded_per_second: float | None
    peak_memory_mb: float


class MatmulBenchmark:
    """A product of two square matrices in the precision of the forward pass, which measures the speed of the machine."""

    def __init__(self, hardware: Hardware) -> None:
        side = 8192 if hardware.device.type == "cuda" else 2048  # the time of a small product is launch overhead on a fast GPU
        options = {"device": hardware.device, "dtype": PRECISIONS[hardware.precision]}
        self.a, self.b, self.out = (torch.randn(side, side, **options) for _ in range(3))  # type: ignore[call-overload]
        self.flop = 2 * side**3
        self()  # the first product is slower

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.out)


def required_steps(warmup: int, steps: int) -> int:
    """Return the length of a run that `measure_steps` can take its steps and batches from."""
    return warmup + 2 + 4 * steps


def measure_steps(trainer: Trainer, warmup: int, steps: int) -> StepMeasurements:
    """Measure `steps` ordinary training steps after `warmup` others."""
    for step in range(warmup):
        trainer.train_step(trainer.get_batch(step), step)
    flop = count_flop(trainer, warmup)
    hardware = trainer.components.hardware
    peak_memory_mb = hardware.peak_memory_mb()
    matmul, timer = MatmulBenchmark(hardware), PhaseTimer(trainer.device)
    attach_phase_timer(trainer, timer)
    measured = range(warmup + 1, warmup + 1 + steps)
    for step in progress_bar(measured, desc="measuring", unit="step", disable=not trainer.world.main):
        timer.start_round("matmul")
        matmul()
        timer.enter("augment")
        trainer.train_step(trainer.get_batch(step), step)
    rounds = timer.read()
    matmul_seconds = [seconds.pop("matmul") for seconds in rounds]
    phases = {phase: median(seconds.get(phase, 0.0) for seconds in rounds) for phase in PHASES}
    return StepMeasurements(
        step_seconds=median(sum(seconds.values()) for seconds in rounds),
        phase_seconds={phase: seconds for phase, seconds in phases.items() if seconds},
        fixed_fraction=estimate_fixed_fraction(trainer, timer, measured.stop),
        flop=flop,
        matmul_flops=matmul.flop / median(matmul_seconds),
        decoded_per_second=measure_decoding(trainer, measured.stop + 1, steps),
        peak_memory_mb=peak_memory_mb,
    )


def count_flop(trainer: Trainer, step: int) -> int:
    """Return the FLOP of a step, which runs without compilation because the counter cannot look into compiled blocks."""
    torch.compiler.set_stance("force_eager")
    try:
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(trainer.get_batch(step), step)
    finally:
        torch.compiler.set_stance("default")
    return counter.get_total_flops()


def estimate_fixed_fraction(trainer: Trainer, timer: PhaseTimer, step: int) -> float | None:
    """Return the fraction of a step's time that does not depend on the batch, None if the batch is too small to tell.

    The line through the times of a small and of the full batch is extrapolated to zero images.
    """
    timer.start_round("augment")
    batch = trainer.get_batch(step)
    num_views = trainer.components.dataset.views
    num_images, num_small = len(batch.global_crops) // num_views, SMALL_BATCH_SIZE * trainer.accumulate
    if num_images < 2 * num_small:
        return None
    local_crops = None if batch.local_crops is None else batch.local_crops[: num_small * len(batch.local_crops) // num_images]
    num_crops = num_small * num_views
    masks = batch.masks.select(torch.arange(num_crops))
    small = Batch(batch.global_crops[:num_crops], masks, local_crops, batch.boxes[:num_small])
    trainer.train_step(small, step)  # the first step with new shapes is slower
    timer.read()
    for _ in range(NUM_COMPARISONS):
        for compared in (small, batch):
            timer.start_round("other")
            trainer.train_step(compared, step)
    seconds = [sum(phases.values()) for phases in timer.read()]
    small_seconds, full_seconds = median(seconds[::2]), median(seconds[1::2])
    fixed_seconds = (small_seconds * num_images - full_seconds * num_small) / (num_images - num_small)
    return min(1.0, max(0.0, fixed_seconds / full_seconds))


def measure_decoding(trainer: Trainer, first_step: int, steps: int) -> float | None:
    """Return the images per second that this process' workers decode while nothing else runs, None for images in memory.

    Workers decode some batches ahead, so the measured steps are too few to show how long training waits for images in the end.
    """
    if not isinstance(trainer.images, Stream):
        return None
    trainer.close()
    files, batch_size = trainer.images.files, trainer.images.batch_size
    stream = Stream(files, trainer.indices, batch_size, first_step + 3 * steps, trainer.device)
    skipped, num_images = min(stream.num_workers, 2 * steps), 0  # the first batches include the start of the workers
    for step in range(skipped):
        stream.batch(first_step + step)
    start = time.perf_counter()
    for step in range(skipped, 3 * steps):
        num_images += len(stream.batch(first_step + step))
    return num_images / (time.perf_counter() - start)
