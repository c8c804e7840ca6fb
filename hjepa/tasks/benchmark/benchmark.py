"""`task=benchmark`: the cost of a training step by phase, what it is bound by, and how it compares with the machine's speed.

A benchmark has a folder of its own:

summary.json        all results
plots/phases.png    the time of every phase
metrics.jsonl       the numbers that are sent to trackers
"""

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from hjepa.config.identity import flatten
from hjepa.config.instantiate import build
from hjepa.config.schema import Config
from hjepa.config.types import PositiveFloat, PositiveInt
from hjepa.distributed.launch import launch
from hjepa.distributed.process_group import destroy_process_group
from hjepa.plotting import COLORS, save_figure
from hjepa.tasks.benchmark.measure import StepMeasurements, measure_steps, required_steps
from hjepa.tracking.provenance import git_state
from hjepa.tracking.resend import send_idle_run
from hjepa.tracking.run_folder import RunFolder
from hjepa.training.build import Components, build_components
from hjepa.training.trainer import Trainer

# What a step can be bound by, and the share of its time that indicates it.
BOUNDS = {
    "data": "is spent waiting for images",
    "launch": "does not depend on the batch: launching operations, the update, communication between processes",
    "compute": "grows with the batch",
    "computing": "is spent computing; the batch is too small to tell how much of that depends on it",
}


def run_benchmark(
    config: Config, path: Path, warmup: PositiveInt, steps: PositiveInt, reference_gflop: PositiveFloat | None
) -> float | None:
    """Measure training steps; print, save and track the results.

    Args:
        config: Resolved config.
        path: Folder of the benchmark.
        warmup: Number of steps before the measured ones.
        steps: Number of measured steps.
        reference_gflop: FLOP (1e9) per image of a reference implementation. The normalized speed is images/s times this number,
            divided by the matmul rate of the machine. None uses the FLOP that this implementation counts.

    Returns:
        Images per second.
    """
    return launch(partial(benchmark_process, warmup=warmup, steps=steps, reference_gflop=reference_gflop), config, path)


def benchmark_process(config: Config, path: Path, warmup: int, steps: int, reference_gflop: float | None) -> float:
    """Run the benchmark in this process, which may be one of several."""
    folder = RunFolder(path, config)
    components: Components = build_components(config)
    world = components.world
    if components.dataset.early_share > 0:
        components.dataset.early_share = 1.0  # all steps are like those of the first part of the training
    train, _ = components.dataset.train_and_validation()
    length = {"epochs": None, "steps": required_steps(warmup, steps), "batch_start": None, "batch_warmup": 0}
    trainer: Trainer = build(config["train"] | length, components=components, images=train.epoch_images)
    trainer.model.train()
    try:
        by_process = world.all_gather_object(measure_steps(trainer, warmup, steps))
    finally:
        trainer.close()
    summary = build_summary(by_process, trainer.plan.batch_size, reference_gflop) | {
        "device": components.hardware.describe(),
        "processes": world.size,
        "seed": config["seed"],
        "parameters": components.model.parameter_counts(),
        **git_state(),
    }
    if world.main:
        save_results(folder, summary)
        print_summary(summary, folder.path)
    destroy_process_group()
    return float(summary["images_per_second"])


def build_summary(by_process: list[StepMeasurements], batch_size: int, reference_gflop: float | None) -> dict[str, Any]:
    """Combine the measurements of all processes, which share every batch.

    Rates and FLOP are summed over processes, times are those of the main process, and memory is the largest of any process.

    Args:
        by_process: Measurements of every process, the main one first.
        batch_size: Images per step, of all processes together.
        reference_gflop: See `run_benchmark`.

    Returns:
        The content of summary.json.
    """
    main, decoding_rates = by_process[0], [m.decoded_per_second for m in by_process if m.decoded_per_second]
    decoded_per_second = sum(decoding_rates) if decoding_rates else None
    # Batches that were decoded ahead are used up in a longer run, so a step takes at least as long as decoding its images.
    seconds = max(main.step_seconds, batch_size / decoded_per_second if decoded_per_second else 0.0)
    waiting = main.phase_seconds.get("data", 0.0) + seconds - main.step_seconds
    bound_seconds = {"data": waiting, **split_computing(seconds - waiting, main.fixed_fraction)}
    speed, flop, matmul_flops = batch_size / seconds, sum(m.flop for m in by_process), sum(m.matmul_flops for m in by_process)
    gflop_per_image = flop / batch_size / 1e9
    return {
        "status": "finished",
        "images_per_second": speed,
        "batch_size": batch_size,
        "step_seconds": main.step_seconds,
        "phase_seconds": main.phase_seconds,
        "decoded_per_second": decoded_per_second,
        "bound": max(bound_seconds, key=lambda name: bound_seconds[name]),
        "shares": {name: s / seconds for name, s in bound_seconds.items()},
        "gflop_per_image": gflop_per_image,
        "flops": flop / seconds,
        "matmul_flops": matmul_flops,
        "utilization": flop / seconds / matmul_flops,
        "reference_gflop": reference_gflop or gflop_per_image,
        "normalized": speed * (reference_gflop or gflop_per_image) * 1e9 / matmul_flops,
        "peak_memory_mb": max(m.peak_memory_mb for m in by_process),
    }


def split_computing(seconds: float, fixed_fraction: float | None) -> dict[str, float]:
    """Return the computing time of a step by what bounds it, as far as that is known."""
    if fixed_fraction is None:
        return {"computing": seconds}
    return {"launch": seconds * fixed_fraction, "compute": seconds * (1 - fixed_fraction)}


def save_results(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write all files of the benchmark and send them to the trackers."""
    folder.claim(overwrite=True)
    numbers = {key: value for key, value in flatten(summary).items() if isinstance(value, float)}
    folder.append({"step": 0, **numbers})
    plot_phases(summary, folder.path / "plots" / "phases.png")
    folder.write_summary(summary)
    if folder.config["tracking"]:
        folder.mark_unsent()
        send_idle_run(folder.config, folder.path)
    folder.release()


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Print the results as a table and a few lines."""
    total, precision = summary["step_seconds"], summary["device"].split(", ")[1]
    print(f"{summary['device']}, batches of {summary['batch_size']}")
    for phase, seconds in summary["phase_seconds"].items():
        print(f"  {phase:<20}{1000 * seconds:9.1f} ms {seconds / total:6.1%}")
    print(f"  {'step':<20}{1000 * total:9.1f} ms")
    if summary["decoded_per_second"]:
        print(f"{summary['decoded_per_second']:.1f} images/s decoded while nothing else runs")
    print(f"{summary['images_per_second']:.1f} images/s, peak memory {summary['peak_memory_mb']:.0f} MB per process")
    bound = summary["bound"]
    print(f"bound by {bound}: {summary['shares'][bound]:.0%} of the time {BOUNDS[bound]}")
    rates = f"{summary['flops'] / 1e9:.0f} GFLOP/s, {summary['utilization']:.1%} of the machine's matmul rate in {precision}"
    print(f"{summary['gflop_per_image']:.2f} GFLOP per image, {rates}, {summary['matmul_flops'] / 1e9:.0f} GFLOP/s")
    print(f"normalized: {summary['normalized']:.3f} (images/s x {summary['reference_gflop']:.2f} GFLOP / matmul rate)")
    print(f"Benchmark folder: {path}")


def plot_phases(summary: dict[str, Any], path: Path) -> None:
    """Plot one bar per phase, in the order of the data flow."""
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
    save_figure(figure, path)
