"""`task=benchmark`: what a training step costs, phase by phase, what bounds it, and how that compares with the machine's speed.

summary.json   every figure        plots/phases.png   where the time goes        metrics.jsonl   what trackers get
"""

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from hjepa.config.errors import UserError
from hjepa.config.identity import flatten
from hjepa.config.instantiate import build
from hjepa.config.schema import Config
from hjepa.distributed.launch import launch
from hjepa.distributed.process_group import destroy_process_group
from hjepa.plotting import COLORS, save
from hjepa.tasks.benchmark.measure import Figures, measure, steps_needed
from hjepa.tracking.provenance import git_state
from hjepa.tracking.resend import deliver
from hjepa.tracking.run_folder import RunFolder
from hjepa.training.build import Components, build_components
from hjepa.training.trainer import Trainer

# What a step is bound by -> the part of its time that says so.
BOUNDS = {
    "data": "waits for images",
    "launch": "is the same for any batch: launching operations, the update, messages between processes",
    "compute": "grows with the batch",
}


def run_benchmark(config: Config, path: Path, warmup: int, steps: int, reference_gflop: float | None) -> float | None:
    """Measure training steps; print, save and track the figures.

    Args:
        warmup, steps: steps that are not counted, steps that are.
        reference_gflop: FLOP (1e9) per image of the work as a reference implementation does it; the normalized figure is
            images/s times that, over the machine's matmul rate. None takes this implementation's own count.

    Returns:
        Images per second.
    """
    if warmup < 1 or steps < 1:
        raise UserError(f"task.warmup={warmup} and task.steps={steps} must be at least 1.")
    if reference_gflop is not None and reference_gflop <= 0:
        raise UserError(f"task.reference_gflop={reference_gflop}: expected a positive number, or null for this one's own count.")
    return launch(partial(measure_here, warmup=warmup, steps=steps, reference_gflop=reference_gflop), config, path)


def measure_here(config: Config, path: Path, warmup: int, steps: int, reference_gflop: float | None) -> float:
    """Measure in this process, alone or as one of several."""
    folder = RunFolder(path, config)
    parts: Components = build_components(config)
    train, _ = parts.dataset.train_and_validation()
    length = {"epochs": None, "steps": steps_needed(warmup, steps), "batch_start": None, "batch_warmup": 0}
    trainer: Trainer = build(config["train"] | length, parts=parts, images=train.images)
    trainer.model.train()
    try:
        every = parts.world.all_gather_object(measure(trainer, warmup, steps))
    finally:
        trainer.close()
    summary = build_summary(every, trainer.plan.batch_size, reference_gflop) | {
        "device": parts.hardware.describe(),
        "processes": parts.world.size,
        "seed": config["seed"],
        "parameters": parts.model.parameter_counts(),
        **git_state(),
    }
    if parts.world.main:
        save_results(folder, summary)
        print_summary(summary, folder.path)
    destroy_process_group()
    return float(summary["images_per_second"])


def build_summary(every: list[Figures], batch_size: int, reference_gflop: float | None) -> dict[str, Any]:
    """The figures of all processes, which share every batch, as those of the machine: rates and FLOP add up, times are the
    main process', memory is that of the process that needs most.
    """
    main, rates = every[0], [figures.decoded for figures in every if figures.decoded]
    decoded = sum(rates) if rates else None
    seconds = max(main.step_seconds, batch_size / decoded if decoded else 0.0)  # images ahead do not last
    waits = main.phase_seconds.get("data", 0.0) + seconds - main.step_seconds
    fixed = (seconds - waits) * (main.fixed or 0.0)
    shares = {"data": waits, "launch": fixed, "compute": seconds - waits - fixed}
    speed, flop, matmul_flops = batch_size / seconds, sum(f.flop for f in every), sum(f.matmul_flops for f in every)
    own = flop / batch_size / 1e9
    return {
        "status": "finished",
        "images_per_second": speed,
        "batch_size": batch_size,
        "step_seconds": main.step_seconds,
        "phase_seconds": main.phase_seconds,
        "decoded_per_second": decoded,
        "bound": max(shares, key=lambda name: shares[name]),
        "shares": {name: share / seconds for name, share in shares.items()},
        "gflop_per_image": own,
        "flops": flop / seconds,
        "matmul_flops": matmul_flops,
        "utilization": flop / seconds / matmul_flops,
        "reference_gflop": reference_gflop or own,
        "normalized": speed * (reference_gflop or own) * 1e9 / matmul_flops,
        "peak_memory_mb": max(figures.peak_memory_mb for figures in every),
    }


def save_results(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write everything to the folder and send it to the trackers."""
    folder.claim(overwrite=True)
    numbers = {key: value for key, value in flatten(summary).items() if isinstance(value, float)}
    folder.append({"step": 0, **numbers})
    plot_phases(summary, folder.path / "plots" / "phases.png")
    folder.write_summary(summary)
    if folder.config["tracking"]:
        folder.mark_unsent()
        deliver(folder.config, folder.path)
    folder.release()


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Print the table."""
    total, precision = summary["step_seconds"], summary["device"].split(", ")[1]
    print(f"{summary['device']}, batches of {summary['batch_size']}")
    for phase, seconds in summary["phase_seconds"].items():
        print(f"  {phase:<20}{1000 * seconds:9.1f} ms {seconds / total:6.1%}")
    print(f"  {'step':<20}{1000 * total:9.1f} ms")
    if summary["decoded_per_second"]:
        print(f"{summary['decoded_per_second']:.1f} images/s decoded while nothing else is done")
    print(f"{summary['images_per_second']:.1f} images/s, peak memory {summary['peak_memory_mb']:.0f} MB of a process")
    bound = summary["bound"]
    print(f"bound by {bound}: {summary['shares'][bound]:.0%} of the time {BOUNDS[bound]}")
    rates = f"{summary['flops'] / 1e9:.0f} GFLOP/s, {summary['utilization']:.1%} of the machine's matmul rate in {precision}"
    print(f"{summary['gflop_per_image']:.2f} GFLOP per image, {rates}, {summary['matmul_flops'] / 1e9:.0f} GFLOP/s")
    print(f"normalized: {summary['normalized']:.3f} (images/s x {summary['reference_gflop']:.2f} GFLOP / matmul rate)")
    print(f"Benchmark folder: {path}")


def plot_phases(summary: dict[str, Any], path: Path) -> None:
    """A bar per phase of the step, in the order of the data flow.

    Args:
        summary: see `hjepa.tasks.benchmark.benchmark.build_summary`.
    """
    phases, total = summary["phase_seconds"], summary["step_seconds"]
    figure, axis = plt.subplots(figsize=(7.0, 0.9 + 0.32 * len(phases)), layout="constrained")
    bars = axis.barh(list(phases), [1000 * seconds for seconds in phases.values()], color=COLORS[0])
    axis.bar_label(bars, [f"{1000 * s:.1f} ms, {s / total:.1%}" for s in phases.values()], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_xlabel("ms of a step")
    axis.set_title(
        f"{summary['device']}, batches of {summary['batch_size']}\n{summary['images_per_second']:.1f} images/s, "
        f"{summary['utilization']:.0%} of the matmul rate, bound by {summary['bound']}",
        fontsize=9,
    )
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)
