"""`task=benchmark`: what a step costs, phase by phase, and how that compares with the machine's own speed.

Nothing in the trainer is there for the benchmark: the phases are found by hooks around the parts of an ordinary step.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hjepa.assemble import assemble
from hjepa.config import Config, build
from hjepa.errors import UserError
from hjepa.folder import RunFolder
from hjepa.origin import git_state
from hjepa.processes.distributed import leave
from hjepa.processes.ranks import launch
from hjepa.trainer import Parts, Trainer

MATMUL = 2048  # side of the product that measures the machine's speed


class Clock:
    """Seconds by phase within a step; waits for the device at every mark."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = 0.0

    def now(self) -> float:
        """The time once the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def mark(self, phase: str) -> None:
        """Charge the time since the last mark to a phase."""
        now = self.now()
        self.seconds[phase] += now - self.last
        self.last = now

    def around(self, call: Callable[..., Any], before: str, phase: str) -> Callable[..., Any]:
        """The call, charging what came before it to one phase and itself to another."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            result = call(*args, **kwargs)
            self.mark(phase)
            return result

        return timed


def watch_phases(trainer: Trainer, clock: Clock) -> None:
    """Hang the clock around the parts of a step, in the order in which they run."""
    model, parts = trainer.model, trainer.parts
    modules = {name: part for name, part in model.named_children() if name in ("teacher", "student", "predictor")}
    for phase, module in modules.items():
        module.register_forward_pre_hook(lambda *_: clock.mark("other"))
        module.register_forward_hook(lambda *_, phase=phase: clock.mark(phase))
    parts.optimizer.register_step_pre_hook(lambda *_: clock.mark("loss and backward"))
    parts.optimizer.register_step_post_hook(lambda *_: clock.mark("optimizer"))
    parts.teacher.update = clock.around(parts.teacher.update, "optimizer", "teacher update")  # type: ignore[method-assign]
    trainer.batch = clock.around(trainer.batch, "other", "data and masks")  # type: ignore[method-assign]


def matmul_rate(device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of a float32 product of two 2048 x 2048 matrices, median of the repeats, with this process' threads."""
    a, b, out = (torch.randn(MATMUL, MATMUL, device=device) for _ in range(3))
    clock, seconds = Clock(device), []
    for _ in range(repeats + 1):
        began = clock.now()
        torch.mm(a, b, out=out)
        seconds.append(clock.now() - began)
    return 2 * MATMUL**3 / median(seconds[1:])


def measure(trainer: Trainer, warmup: int, steps: int) -> dict[str, Any]:
    """Times of `steps` ordinary steps, interleaved with the machine's matmul rate, and the FLOP of one step."""
    device = trainer.device
    for step in range(warmup):
        trainer.step(*trainer.batch(step), step)
    with FlopCounterMode(display=False) as counter:
        trainer.step(*trainer.batch(warmup), warmup)
    clock, totals, rates = Clock(device), [], []
    phases: dict[str, list[float]] = defaultdict(list)
    watch_phases(trainer, clock)
    for step in range(warmup + 1, warmup + 1 + steps):
        rates.append(matmul_rate(device, 1))
        clock.seconds.clear()
        began = clock.last = clock.now()
        trainer.step(*trainer.batch(step), step)
        totals.append(clock.now() - began)
        for phase, seconds in clock.seconds.items():
            phases[phase].append(seconds)
    return {
        "step_seconds": median(totals),
        "phase_seconds": {phase: median(seconds) for phase, seconds in phases.items()},
        "matmul_flops": median(rates),
        "step_flop": counter.get_total_flops(),
    }


def benchmark(config: Config, path: Path, warmup: int, steps: int, reference_gflop: float | None) -> float | None:
    """Measure training steps, print and save the figures.

    Args:
        warmup, steps: steps that are not counted, steps that are.
        reference_gflop: FLOP (1e9) per image of the work as a reference implementation does it; the normalised figure is
            images/s times that, over the machine's matmul rate. None takes this implementation's own count.

    Returns:
        Images per second.
    """
    if warmup < 1 or steps < 1:
        raise UserError(f"task.warmup={warmup} and task.steps={steps} must be at least 1.")
    return launch(partial(measure_here, warmup=warmup, steps=steps, reference_gflop=reference_gflop), config, path)


def measure_here(config: Config, path: Path, warmup: int, steps: int, reference_gflop: float | None) -> float:
    """Measure in this process, alone or as one of several."""
    folder = RunFolder(path, config)
    parts: Parts = assemble(config)
    train, _ = parts.dataset.train_and_validation()
    lengths = {"epochs": None, "steps": warmup + steps + 1, "batch_start": None, "batch_warmup": 0}
    trainer: Trainer = build(config["train"] | lengths, parts=parts, images=train.images)
    trainer.model.train()
    figures = measure(trainer, warmup, steps)
    speed = trainer.plan.batch_size / figures["step_seconds"]
    own = figures["step_flop"] / trainer.plan.batch_size / 1e9
    summary = figures | {
        "status": "finished",
        "images_per_second": speed,
        "batch_size": trainer.plan.batch_size,
        "gflop_per_image": own,
        "reference_gflop": reference_gflop or own,
        "normalised": speed * (reference_gflop or own) * 1e9 / figures["matmul_flops"],
        "peak_memory_mb": parts.hardware.peak_memory_mb(),
        "device": parts.hardware.describe(),
        "seed": config["seed"],
        "parameters": parts.model.parameter_counts(),
        **git_state(),
    }
    if parts.world.main:
        folder.claim(overwrite=True)
        folder.write_summary(summary)
        folder.release()
        tell(summary, folder.path)
    leave()
    return speed


def tell(summary: dict[str, Any], path: Path) -> None:
    """Print the table."""
    total = summary["step_seconds"]
    print(f"{summary['device']}, batches of {summary['batch_size']}")
    for phase, seconds in summary["phase_seconds"].items():
        print(f"  {phase:<20}{1000 * seconds:9.1f} ms {seconds / total:6.1%}")
    print(f"  {'step':<20}{1000 * total:9.1f} ms")
    print(f"{summary['images_per_second']:.1f} images/s, {summary['gflop_per_image']:.2f} GFLOP per image")
    print(f"matmul rate {summary['matmul_flops'] / 1e9:.0f} GFLOP/s, peak memory {summary['peak_memory_mb']:.0f} MB")
    print(f"normalised: {summary['normalised']:.3f} (images/s x {summary['reference_gflop']:.2f} GFLOP / matmul rate)")
    print(f"Benchmark folder: {path}")
