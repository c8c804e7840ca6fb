"""The command line as a user types it: exit codes, messages of one sentence, and nothing written before work starts."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from hjepa.config.errors import UserError
from tests.helpers import children
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
)


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml") if not p.stem.startswith("_"))


@pytest.mark.thorough
@pytest.mark.parametrize("override", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_option_composes_and_checks(override: str) -> None:
    from hjepa.config.schema import check, resolve

    cfg = compose(override)
    if missing := OmegaConf.missing_keys(cfg):
        cfg = compose(override, *(f"{key}=[x]" if key.endswith("roots") else f"{key}=x" for key in missing))
    check(resolve(cfg))


def test_help_lists_the_options_in_less_than_two_seconds() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = launch("--help", "model=vit_tiny")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert all(f"\n{group}: {', '.join(options(group))}\n" in result.stdout for group in GROUPS)
    assert "_common" not in result.stdout, "files that other files include are not options"
    assert "dim: 192" in result.stdout, "the config is that of the command"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 2, "processor time, which other processes do not change"


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
        (["optimizer.lr=abc"], ["optimizer.lr='abc'", "expected PositiveFloat"]),
        (["seed=1.5"], ["seed=1.5", "expected int"]),
        (["train.epochs=many"], ["train.epochs='many'", "int"]),
        (["levels.pool=2"], ["levels.pool=2", "list[PositiveInt | Literal['whole']]"]),
        (["hardware.precision=float8"], ["hardware.precision='float8'", "bfloat16"]),
        (["dataset=image_folder"], ["dataset.root has no value", "dataset.root=..."]),
        (["name=lr=0.1"], ["""name=lr=0.1 cannot be parsed as it is; write 'name="lr=0.1"'"""]),
        (["seed=1", "dataset.root=/data/My", "Photos", "(2024)"], ["""; write 'dataset.root="/data/My Photos (2024)"'"""]),
        (["name=../../x"], ["name=../../x is not the name of a folder inside of output_root"]),
        (["experiment_name=.."], ["experiment_name=.. is not the name of a folder inside of output_root"]),
        (["name=a,b"], ["name=a,b has several values; add --multirun to try each, or write 'name=[a,b]' for a list"]),
        (["model=3"], ["model=3 chooses no option"]),
        (["train.steps=${nope}"], ["train.steps refers to a value that does not exist"]),
        (
            ["run=outputs/default/photos", "train.epochs=100"],
            ["run=outputs/default/photos names an earlier run", "task=evaluate"],
        ),
        (["task=evaluate", "run=/r", "dataset=image_folder"], ["dataset=image_folder: task=evaluate takes", "task.root"]),
        (["protocol=linear"], ["protocol belongs to task=evaluate; add task=evaluate and run="]),
        (["protocol.knn.neighbors=3"], ["protocol.knn.neighbors belongs to task=evaluate"]),
        (["dataset@protocol.transfer.dataset=stl10"], ["dataset@protocol.transfer.dataset belongs to task=evaluate", "transfer"]),
        (["--config-name=foo"], ["--config-name=foo is not an option"]),
    ],
)
def test_errors_in_a_config_are_reported_before_torch_is_imported(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
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
        (["levels.pool=[1,8]"], "does not fit the grid of 8x8"),
        (["levels.stage=[-1]"], "one entry per level"),
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
        (["model.image_size=64"], "model.image_size=64: the images have dataset.image_size=32"),
        (["dataset.image_size=8", "model.patch_size=1"], "at least 16 pixels"),
        (["checkpoint.every_seconds=0"], "checkpoint.every_seconds"),
        (["output_root=/dev/null/x"], "cannot be written"),
    ],
)
def test_options_that_do_not_fit_together_are_refused_before_work_starts(
    run, tmp_path: Path, overrides: list[str], word: str
) -> None:
    import torch

    if ("m1_max" in overrides[-1] and torch.backends.mps.is_available()) or (
        "cuda" in overrides[-1] and torch.cuda.is_available()
    ):
        overrides, word = ["hardware.threads=0"], "hardware.threads=0"  # this machine has the device
    with pytest.raises(UserError, match=word.replace("[", r"\[")) as caught:
        run(*overrides)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("flags", [["--multirun", "--cfg", "job"], ["-m", "--info", "all"]])
def test_flags_that_show_one_config_are_refused_beside_a_sweep(flags: list[str]) -> None:
    result = launch("seed=0,1", *flags)
    assert result.returncode == 1
    assert result.stderr == "--cfg and --info show one config; leave --multirun out and give each swept key one value.\n"


def test_the_help_of_a_sweep_leaves_out_what_is_swept() -> None:
    result = launch("--multirun", "masking=multiblock,hierarchical", "masking.context_scale=[0.7,1.0]", "seed=0,1", "--help")
    assert result.returncode == 0, result.stderr
    assert "seed: 0\n" in result.stdout


def test_a_sweep_into_an_unwritable_folder_is_refused() -> None:
    result = children.launch("--multirun", *TINY, "output_root=/dev/null/x", "seed=0,1")
    assert result.returncode == 1
    assert "/dev/null is no folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_device_is_reported_in_one_sentence(tmp_path: Path) -> None:
    result = children.launch(
        "model=vit_small", "hardware=m1_max", "hardware.device=cuda", f"output_root={tmp_path}", CUDA_VISIBLE_DEVICES=""
    )
    assert result.returncode == 1
    assert "this machine has no cuda device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(tmp_path / "images" / label / f"{i}.jpg")
    (tmp_path / "images" / "a" / "0.jpg").write_bytes(b"broken")
    data = ("dataset=image_folder", f"dataset.root={tmp_path}/images", "dataset.validation=0.2")
    result = children.launch(*data, "tracking=none", f"output_root={tmp_path}/out")
    assert result.returncode == 1
    assert "1 of 10 images cannot be read" in result.stderr
    assert "a/0.jpg" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unlabeled_folder_trains_without_probes_and_is_refused_with_them(run, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (32, 32), (i * 4, 255 - i * 4, (i * 37) % 256)).save(folder / f"{i}.png")
    data = ("dataset=image_folder", f"dataset.root={folder}")
    strip = [o for o in TINY if not o.startswith(("dataset.", "probe."))] + [f"output_root={tmp_path}/out"]
    from hjepa.config.run import run as run_config

    with pytest.raises(UserError, match="The probes need labels, and the images have none"):
        run_config(compose(*strip, *data))
    assert run_config(compose(*strip, *data, "probe=none", "name=r")) is None
    assert json.loads((tmp_path / "out" / "default" / "r" / "summary.json").read_text())["status"] == "finished"


def test_a_folder_of_equal_images_is_refused_before_training(run, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            Image.new("I;16", (32, 32), 60000).save(tmp_path / "images" / label / f"{i}.png")
    with pytest.raises(UserError, match="images that were compared have the same pixels"):
        run("dataset=image_folder", f"dataset.root={tmp_path}/images", "train.batch_size=4")
    assert [path.name for path in tmp_path.iterdir()] == ["images"], "nothing is written"


@pytest.mark.thorough
def test_a_run_from_another_folder_prints_its_folder_last(tmp_path: Path) -> None:
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
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["here"], "no other files are written"
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "run.log", "checkpoints", "plots"} <= names


@pytest.mark.thorough
def test_without_tracking_mlflow_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("raise RuntimeError('mlflow was imported')")
    result = launch(*TINY, f"output_root={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.thorough
def test_missing_mlflow_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("raise ImportError('no mlflow')")
    result = launch(*TINY, "tracking=mlflow", f"output_root={tmp_path}/out", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "tracking=mlflow needs the package mlflow" in result.stderr


def test_importing_the_config_and_the_tasks_imports_no_torch() -> None:
    code = "import sys, hjepa.config.run, hjepa.tasks.sweep; assert not {'torch', 'mlflow', 'timm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), check=False).returncode == 0


@pytest.mark.thorough
def test_a_run_whose_output_is_cut_off_saves_its_result(tmp_path: Path) -> None:
    arguments = shlex.join(
        [sys.executable, str(ROOT / "launch.py"), *TINY, "train.epochs=1", f"output_root={tmp_path}", "name=r"]
    )
    command = f"{arguments} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=500, check=False)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1), result.stderr
    assert result.stderr == ""
    assert json.loads((tmp_path / "default" / "r" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("flag", ["--help", "--hydra-help", "--cfg=job"])
def test_a_listing_whose_reader_has_gone_ends_quietly(flag: str) -> None:
    command = f"{shlex.join([sys.executable, str(ROOT / 'launch.py'), flag])} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=500, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "module",
    [
        "hydra.py",  # imported first
        "hydra_plugins/slow.py",  # imported by Hydra before it composes the config
        "torch.py",  # imported once the config has been checked
    ],
)
def test_ctrl_c_before_the_run_starts_ends_with_one_sentence(tmp_path: Path, module: str) -> None:
    file = tmp_path / "modules" / module
    file.parent.mkdir(parents=True)
    file.write_text("import sys, time; print('importing', flush=True); time.sleep(300)")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *TINY, f"output_root={tmp_path}/out"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "modules")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    os.killpg(process.pid, signal.SIGINT)  # to the whole process group, as a terminal does
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "Interrupted before anything was started.\n")
    assert not (tmp_path / "out").exists()
