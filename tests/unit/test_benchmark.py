"""Tests of `task=benchmark`: phases add up to the step, processes are combined, and the bound is recognized."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa.config.errors import UserError, friendly_errors
from hjepa.tasks.benchmark.benchmark import build_summary
from hjepa.tasks.benchmark.measure import StepMeasurements
from hjepa.tasks.benchmark.phase_timer import PhaseTimer, attach_phase_timer
from tests.helpers.database import prepare_database
from tests.helpers.runs import trainer

Run = Callable[..., float | None]
STEPS = ("task=benchmark", "task.steps=3", "task.warmup=1", "name=b")
SMALLEST = ("model.encoder.dim=16", "model.encoder.depth=1", "dataset.image_size=16", "train.batch_size=8", "levels=flat")


def read_summary(root: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((root / "default" / "benchmark-b" / "summary.json").read_text())
    return contents


def test_benchmark_is_printed_and_tracked(run: Run, tmp_path: Path, capsys) -> None:
    prepare_database(tmp_path)
    speed = run(*STEPS, "tracking=mlflow", "tracking.mlflow.system_metrics=false", "projector=mlp")
    summary = read_summary(tmp_path)
    assert speed == summary["images_per_second"] > 0
    assert {"data", "augment", "masks", "student", "teacher", "predictor", "projector", "loss", "backward", "optimizer"} < set(
        summary["phase_seconds"]
    )
    assert summary["normalized"] == pytest.approx(summary["utilization"]), "without a reference, both use the counted FLOP"
    assert sum(summary["shares"].values()) == pytest.approx(1)
    out = capsys.readouterr().out
    assert f"bound by {summary['bound']}" in out
    assert out.strip().splitlines()[-1].startswith("Benchmark folder:")

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.get_run(summary["run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["images_per_second"] == speed
    assert tracked.data.metrics["phase_seconds.backward"] == summary["phase_seconds"]["backward"]
    assert [a.path for a in client.list_artifacts(summary["run_id"], "plots")] == ["plots/phases.png"]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_phases_are_disjoint_and_add_up_to_the_step(accumulate: int) -> None:
    t = trainer(f"train.accumulate={accumulate}", "levels=stacked", "dataset.image_size=32", "masking=multiblock")
    timer = PhaseTimer(t.device)
    attach_phase_timer(t, timer)
    start = time.perf_counter()
    for step in range(3):
        timer.start_round("augment")
        t.train_step(t.get_batch(step), step)
    rounds = timer.read()
    total = time.perf_counter() - start
    assert 0.8 * total < sum(sum(seconds.values()) for seconds in rounds) <= total
    named = [sum(seconds.get(phase, 0) for seconds in rounds) for phase in ("backward", "student", "stacked levels", "other")]
    assert all(named)
    assert named[-1] < 0.1 * total, "the named phases cover the step, also between micro-batches"


@pytest.mark.thorough
def test_measurements_of_two_processes_are_combined(run: Run, tmp_path: Path) -> None:
    summaries = []
    for processes in (1, 2):
        run(*STEPS, f"hardware.processes={processes}", "regularizer=none")
        summaries.append(read_summary(tmp_path))
    alone, both = summaries
    assert both["processes"] == 2
    assert both["gflop_per_image"] == pytest.approx(alone["gflop_per_image"], rel=1e-6)
    for summary in summaries:
        flops = summary["gflop_per_image"] * 1e9 * summary["images_per_second"]
        assert summary["utilization"] == pytest.approx(flops / summary["matmul_flops"])


def folder_of_images(folder: Path, count: int) -> Path:
    """Return a folder of large images, which are slow to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    for number in range(count):
        (folder / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(folder / "train" / "a" / f"{number}.png", compress_level=1)
    return folder


@pytest.mark.thorough
def test_slow_decoding_is_recognized_as_bound_by_data(run: Run, tmp_path: Path) -> None:
    files = folder_of_images(tmp_path / "images", 20)
    options = (*SMALLEST, *STEPS, "dataset=image_folder", f"dataset.root={files}", "dataset.validation=0.2")
    run(*options, "dataset.memory_limit_gb=0", "dataset.workers=0")
    streamed = read_summary(tmp_path)
    assert streamed["bound"] == "data"
    assert streamed["images_per_second"] <= streamed["decoded_per_second"]
    run(*options)
    in_memory = read_summary(tmp_path)
    assert in_memory["bound"] != "data"
    assert in_memory["decoded_per_second"] is None


def test_a_batch_too_small_to_tell_is_bound_by_computing() -> None:
    measured = StepMeasurements(1.0, {"data": 0.2}, None, 10, 100.0, None, 1.0)
    assert build_summary([measured], 8, None)["shares"] == pytest.approx({"data": 0.2, "computing": 0.8})
    known = build_summary([replace(measured, fixed_fraction=0.5)], 8, None)["shares"]
    assert known == pytest.approx({"data": 0.2, "launch": 0.4, "compute": 0.4})


@pytest.mark.thorough
def test_step_that_hardly_depends_on_its_batch_is_bound_by_launch(run: Run, tmp_path: Path) -> None:
    run(*SMALLEST, *STEPS, "dataset.train=60")
    assert read_summary(tmp_path)["bound"] == "launch"
    run(*STEPS, "model.encoder.dim=96", "dataset.train=60")
    assert read_summary(tmp_path)["bound"] == "compute"


@pytest.mark.parametrize("option", ["task.steps=0", "task.warmup=0", "task.reference_gflop=-1.0"])
def test_options_out_of_bounds_are_refused(run: Run, tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match=option):
        run("task=benchmark", option)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_any_task_with_a_message(capsys, request: pytest.FixtureRequest) -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control lets its jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    with pytest.raises(SystemExit) as ended, friendly_errors():
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130
    assert "Interrupted" in capsys.readouterr().err
