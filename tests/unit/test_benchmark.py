"""A benchmark's phases are the step, its figures are those of all processes, and it names what bounds the step."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hjepa.config.errors import UserError, friendly_errors
from hjepa.tasks.benchmark.phase_timer import PhaseTimer, attach_phase_timer
from tests.helpers.runs import trainer

Run = Callable[..., float | None]
STEPS = ("task=benchmark", "task.steps=3", "task.warmup=1", "name=b")
SMALLEST = ("model.encoder.dim=16", "model.encoder.depth=1", "dataset.image_size=16", "train.batch_size=8", "levels=flat")


def summary(root: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((root / "default" / "benchmark-b" / "summary.json").read_text())
    return contents


def test_benchmark_prints_phases_tells_the_bound_and_is_tracked(run: Run, tmp_path: Path, capsys) -> None:
    speed = run(*STEPS, "tracking=mlflow", "tracking.mlflow.system_metrics=false", "projector=mlp")
    found = summary(tmp_path)
    assert speed == found["images_per_second"] > 0
    assert {"data", "augment", "masks", "student", "teacher", "predictor", "projector", "loss", "backward", "optimizer"} < set(
        found["phase_seconds"]
    )
    assert found["normalized"] == pytest.approx(found["utilization"]), "of this implementation's own FLOP"
    assert sum(found["shares"].values()) == pytest.approx(1)
    out = capsys.readouterr().out
    assert f"bound by {found['bound']}" in out
    assert out.strip().splitlines()[-1].startswith("Benchmark folder:")

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.get_run(found["run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["images_per_second"] == speed
    assert tracked.data.metrics["phase_seconds.backward"] == found["phase_seconds"]["backward"]
    assert [a.path for a in client.list_artifacts(found["run_id"], "plots")] == ["plots/phases.png"]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_phases_are_disjoint_and_make_up_the_step(accumulate: int) -> None:
    t = trainer(f"train.accumulate={accumulate}", "levels=stacked", "dataset.image_size=32", "masking=multiblock")
    clock = PhaseTimer(t.device)
    attach_phase_timer(t, clock)
    began = time.perf_counter()
    for step in range(3):
        clock.begin("augment")
        t.train_step(*t.batch(step), step)
    rounds = clock.read()
    whole = time.perf_counter() - began
    assert 0.8 * whole < sum(sum(seconds.values()) for seconds in rounds) <= whole
    named = [sum(seconds.get(phase, 0) for seconds in rounds) for phase in ("backward", "student", "stacked levels", "other")]
    assert all(named)
    assert named[-1] < 0.1 * whole, "what has no name is little, also between the parts of a batch"


def test_figures_of_two_processes_are_those_of_all(run: Run, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        run(*STEPS, f"hardware.processes={processes}", "regularizer=none")
        found.append(summary(tmp_path))
    alone, both = found
    assert both["processes"] == 2
    assert both["gflop_per_image"] == pytest.approx(alone["gflop_per_image"], rel=1e-6)
    for figures in found:
        flops = figures["gflop_per_image"] * 1e9 * figures["images_per_second"]
        assert figures["utilization"] == pytest.approx(flops / figures["matmul_flops"])


def folder_of_images(folder: Path, count: int) -> Path:
    """Large images that take long to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    for number in range(count):
        (folder / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(folder / "train" / "a" / f"{number}.png", compress_level=1)
    return folder


def test_images_that_are_decoded_too_slowly_are_the_bound(run: Run, tmp_path: Path) -> None:
    files = folder_of_images(tmp_path / "images", 20)
    options = (*SMALLEST, *STEPS, "dataset=image_folder", f"dataset.root={files}", "dataset.validation=0.2")
    run(*options, "dataset.memory_limit_gb=0", "dataset.workers=0")
    streamed = summary(tmp_path)
    assert streamed["bound"] == "data"
    assert streamed["images_per_second"] <= streamed["decoded_per_second"]
    run(*options)
    in_memory = summary(tmp_path)
    assert in_memory["bound"] != "data"
    assert in_memory["decoded_per_second"] is None


def test_a_step_that_hardly_depends_on_its_batch_is_bound_by_launching(run: Run, tmp_path: Path) -> None:
    run(*SMALLEST, *STEPS, "dataset.train=60")
    assert summary(tmp_path)["bound"] == "launch"
    run(*STEPS, "model.encoder.dim=96", "dataset.train=60")
    assert summary(tmp_path)["bound"] == "compute"


@pytest.mark.parametrize("option", ["task.steps=0", "task.warmup=0", "task.reference_gflop=-1"])
def test_impossible_measurements_are_refused(run: Run, tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match=option):
        run("task=benchmark", option)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_any_task_with_a_word(capsys) -> None:
    with pytest.raises(SystemExit) as ended, friendly_errors():
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130
    assert "Interrupted" in capsys.readouterr().err
