"""The command line as a user types it: exit codes, one clear sentence, nothing written before work starts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from hjepa.config.errors import UserError
from tests.helpers.runs import ROOT, TINY, compose, launch

GROUPS = (
    "model",
    "levels",
    "masking",
    "loss",
    "regularizer",
    "projector",
    "teacher",
    "optimizer",
    "schedule",
    "dataset",
    "hardware",
    "probe",
    "tracking",
    "task",
    "experiment",
)


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml") if not p.stem.startswith("_"))


@pytest.mark.parametrize("override", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_option_composes_and_checks(override: str) -> None:
    from hjepa.config.schema import check, resolve

    missing = OmegaConf.missing_keys(compose(override))
    check(resolve(compose(override, *(f"{key}=[x]" if key.endswith("roots") else f"{key}=x" for key in missing))))


def test_help_lists_the_groups_quickly() -> None:
    began = time.perf_counter()
    result = launch("--help")
    assert result.returncode == 0
    assert all(f"{group}:" in result.stdout for group in GROUPS if group != "experiment")
    assert time.perf_counter() - began < 10, "generous: two seconds on a quiet machine"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=vit_smal"], ["model=vit_smal is not an option; did you mean vit_small?"]),
        (["modle=vit_small"], ["modle is not an option; did you mean model?"]),
        (["optimizer.lrr=1"], ["optimizer.lrr is not an option; did you mean lr?"]),
        (["model.encoder={"], ["cannot be parsed"]),
        (["optimizer.learning_rate=1"], ["optimizer.learning_rate"]),
        (["+optimizer.foo=1"], ["optimizer.foo is not an option", "lr"]),
        (["+foo=1"], ["foo", "not an option"]),
        (["optimizer.lr=abc"], ["optimizer.lr='abc'", "expected float"]),
        (["seed=1.5"], ["seed=1.5", "expected int"]),
        (["train.epochs=many"], ["train.epochs='many'", "int"]),
        (["levels.pool=2"], ["levels.pool=2", "list[int]"]),
        (["hardware.precision=float8"], ["hardware.precision='float8'", "bfloat16"]),
        (["dataset=image_folder"], ["dataset.root has no value", "dataset.root=..."]),
    ],
)
def test_config_errors_are_said_before_torch_is_imported(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = launch(*overrides, f"output_root={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert result.returncode in (1, 2)
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert "torch was imported" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["model.patch_size=5"], "model.patch_size=5 does not divide dataset.image_size=32"),
        (["levels.pool=[1,8]"], "does not fit a grid of 8x8"),
        (["levels.depth=[1.0]"], "one entry per level"),
        (["masking=multiblock", "masking.target_scale=[0.5,0.6]"], "leave no context"),
        (["masking=partition", "masking.num_parts=7"], "masking.num_parts=7"),
        (["model.encoder.heads=5"], "heads=5"),
        (["hardware=m1_max"], "this machine has no mps device"),
        (["model=vit_small", "hardware=m1_max"], "use hardware=auto or hardware=cpu"),
        (["hardware=cuda"], "this machine has no cuda device"),
        (["hardware.threads=0"], "hardware.threads=0"),
        (["hardware.precision=float16"], "needs a GPU"),
        (["train.batch_size=100000"], "train.batch_size=100000"),
        (["dataset=image_folder", "dataset.root=/nowhere"], "/nowhere is not a folder"),
        (["dataset.train=5"], "leaves no image"),
        (["dataset.image_size=8", "model.patch_size=1"], "at least 16 pixels"),
        (["checkpoint.every_seconds=0"], "checkpoint.every_seconds"),
        (["output_root=/dev/null/x"], "cannot be written"),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(run, tmp_path: Path, overrides: list[str], word: str) -> None:
    import torch

    if ("m1_max" in overrides[-1] and torch.backends.mps.is_available()) or (
        "cuda" in overrides[-1] and torch.cuda.is_available()
    ):
        overrides, word = ["hardware.threads=0"], "hardware.threads=0"  # the device is there
    with pytest.raises(UserError, match=word.replace("[", r"\[")) as caught:
        run(*overrides)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_sweep_into_an_unwritable_folder_as_typed() -> None:
    result = launch("--multirun", *TINY, "output_root=/dev/null/x", "seed=0,1")
    assert result.returncode == 1
    assert "/dev/null is in the way" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_device_as_typed(tmp_path: Path) -> None:
    result = launch(
        "model=vit_small", "hardware=m1_max", "hardware.device=cuda", f"output_root={tmp_path}", CUDA_VISIBLE_DEVICES=""
    )
    assert result.returncode == 1
    assert "this machine has no cuda device" in result.stderr
    assert "Traceback" not in result.stderr


def test_corrupt_image_as_typed(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(tmp_path / "images" / label / f"{i}.jpg")
    (tmp_path / "images" / "a" / "0.jpg").write_bytes(b"broken")
    data = ("dataset=image_folder", f"dataset.root={tmp_path}/images", "dataset.validation=0.2")
    result = launch(*data, "tracking=none", f"output_root={tmp_path}/out")
    assert result.returncode == 1
    assert "1 of 10 images cannot be read" in result.stderr
    assert "a/0.jpg" in result.stderr
    assert not (tmp_path / "out").exists()


def test_unlabeled_folder_trains_without_probes_and_is_refused_with_them(run, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (32, 32), (i * 4, 255 - i * 4, (i * 37) % 256)).save(folder / f"{i}.png")
    data = ("dataset=image_folder", f"dataset.root={folder}")
    strip = [o for o in TINY if not o.startswith(("dataset.", "probe."))] + [f"output_root={tmp_path}/out"]
    from hjepa.config.run import run as run_config

    with pytest.raises(UserError, match="no labels, which the probes need"):
        run_config(compose(*strip, *data))
    assert run_config(compose(*strip, *data, "probe=none", "name=r")) is None
    assert json.loads((tmp_path / "out" / "default" / "r" / "summary.json").read_text())["status"] == "finished"


def test_run_from_another_folder_tells_its_result_last(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    result = launch(*TINY, "output_root=here", "experiment_name=e", "name=r", cwd=tmp_path / "elsewhere")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "elsewhere" / "here" / "e" / "r"
    lines = result.stdout.strip().splitlines()
    assert lines[-1] == f"Run folder: {folder}"
    assert "untrained network" in result.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    needed = {
        "probe",
        "best",
        "untrained",
        "images_per_second",
        "steps",
        "epochs",
        "seconds",
        "peak_memory_mb",
        "parameters",
        "device",
        "seed",
        "run_id",
        "commit",
    }
    assert needed <= summary.keys()
    assert {"linear", "knn", "rankme"} <= summary["probe"].keys() & summary["untrained"].keys()
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["here"], "nothing beside the output folder"
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "run.log", "checkpoints", "plots"} <= names


def test_without_tracking_mlflow_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("raise RuntimeError('mlflow was imported')")
    result = launch(*TINY, f"output_root={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_missing_mlflow_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("raise ImportError('no mlflow')")
    result = launch(*TINY, "tracking=mlflow", f"output_root={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "tracking=mlflow needs the package mlflow" in result.stderr


def test_import_of_the_package_is_light() -> None:
    code = "import sys, hjepa.config.run, hjepa.tasks.sweep; assert not {'torch', 'mlflow', 'timm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), check=False).returncode == 0
