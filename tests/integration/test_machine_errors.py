"""The machine's faults, injected for real: a full disk, no memory, vanished files. Each ends as promised, in one sentence."""

import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from hjepa.config.errors import UserError, explain_machine_error
from hjepa.tracking import atomic
from tests.helpers.children import begin, run_config
from tests.helpers.results import LONG, metrics, weights
from tests.helpers.runs import tiny, trainer
from tests.unit.test_data import make_folder
from tests.unit.test_stream import options


def check_same(a: Path, b: Path) -> None:
    """Two runs ended with the same bits, and recorded the same."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), "bit-identical weights"
    assert metrics(a) == metrics(b), "no step repeated, missing or different"
    for folder in (a, b):
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert not list(folder.rglob(".*.tmp"))


# -- no space ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root: the full-disk test did not run")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Write until nothing more fits."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


@pytest.mark.thorough
def test_a_full_disk_ends_the_run_in_one_sentence_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    command = [*tiny(*LONG), "name=r"]
    folder, said = small_disk / "default" / "r", tmp_path / "said"
    process = begin(run_config, [*command, f"output_root={small_disk}"], said)
    while process.is_alive() and not (folder / "metrics.jsonl").exists():
        time.sleep(0.005)
    while process.is_alive() and len((folder / "metrics.jsonl").read_text().splitlines()) < 6:
        time.sleep(0.005)
    ballast = fill(small_disk)
    process.join(200)
    assert process.exitcode == 1, said.read_text()
    assert "No space left on device. Free some space" in said.read_text().splitlines()[-1]
    assert "Traceback" not in said.read_text()
    assert torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["step"] > 0
    ballast.unlink()
    for root in (small_disk, tmp_path):
        process = begin(run_config, [*command, f"output_root={root}"], said)
        process.join(300)
        assert process.exitcode == 0, said.read_text()
    check_same(folder, tmp_path / "default" / "r")


def run_with_a_full_disk_for(name: str, overrides: list[str], output: Path) -> None:
    """Run a config in a child process where an atomic write of one file finds the disk full."""

    def temporary_path(path: Path) -> Path:
        temporary = original(path)
        if path.name == name and not temporary.is_symlink():
            temporary.symlink_to("/dev/full")
        return temporary

    original, atomic.temporary_path = atomic.temporary_path, temporary_path
    run_config(overrides, output)


@pytest.mark.thorough
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "summary.json", "run.log"])
def test_a_file_that_cannot_be_written(file: str, tmp_path: Path) -> None:
    """Each on its own: the disk is full for this file only. The log is dispensable, the others end the run."""
    folder, said = tmp_path / "default" / "r", tmp_path / "said"
    folder.mkdir(parents=True)
    if file == "run.log":
        (folder / file).symlink_to("/dev/full")
    process = begin(run_with_a_full_disk_for, file, [*tiny(), f"output_root={tmp_path}", "name=r"], said)
    process.join(200)
    assert "Traceback" not in said.read_text()
    assert process.exitcode == (0 if file == "run.log" else 1), said.read_text()


# -- no memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_batch_too_large_for_the_memory(tmp_path: Path) -> None:
    said, folder = tmp_path / "said", tmp_path / "default" / "r"
    large = ["train.batch_size=220", "model.encoder.dim=384", "model.encoder.depth=12", "model.encoder.heads=6", "probe=none"]
    large += [option for option in tiny() if not option.startswith(("probe.", "train.batch_size", "model."))]
    process = begin(run_config, [*large, f"output_root={tmp_path}", "name=r"], said, 1_200_000_000)
    process.join(300)
    assert process.exitcode == 1, said.read_text()
    sentence = said.read_text().splitlines()[-1]
    assert sentence.startswith("Out of memory (")
    assert all(option in sentence for option in ("train.batch_size", "train.accumulate", "hardware.activation_checkpointing"))
    assert "Traceback" not in said.read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "Out of memory" in summary["reason"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_every_kind_of_want_of_memory_is_the_same_sentence(error: Exception) -> None:
    sentence = str(explain_machine_error(error))
    assert sentence.startswith("Out of memory (")
    assert "\n" not in sentence


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("a fault of ours"), OSError(2, "No such file"), UserError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert explain_machine_error(error) is None


def test_a_file_without_permission_is_named() -> None:
    sentence = str(explain_machine_error(PermissionError(13, "Permission denied", "/data/train")))
    assert sentence.startswith("/data/train cannot be accessed (Permission denied); change its permissions")


# -- no compiler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        InvalidCxxCompiler(),
        InvalidCxxCompiler("cl"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    ],
)
def test_a_missing_compiler_is_one_sentence_also_if_the_error_is_wrapped(error: Exception) -> None:
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        sentence = str(explain_machine_error(raised))
        assert sentence.startswith("hardware.compile=true needs a C++ compiler, and none was found (")
        assert "add hardware.compile=false" in sentence
        assert "\n" not in sentence


def run_without_compiler(overrides: list[str], output: Path) -> None:
    """Run a config in a child process that finds no compiler and nothing compiled before."""
    os.environ |= {"PATH": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(output.parent / "compiled")}
    run_config(overrides, output)


@pytest.mark.thorough
def test_a_run_that_finds_no_compiler_is_continued_without_compilation(tmp_path: Path) -> None:
    brief = [option for option in tiny("train.steps=2", "train.epochs=null", "probe=none") if not option.startswith("probe.")]
    command, said = [*brief, f"output_root={tmp_path}", "name=r"], tmp_path / "said"
    process = begin(run_without_compiler, [*command, "hardware.compile=true"], said)
    process.join(300)
    assert process.exitcode == 1, said.read_text()
    assert said.read_text().splitlines()[-1].startswith("hardware.compile=true needs a C++ compiler, and none was found (")
    assert "Traceback" not in said.read_text()
    process = begin(run_without_compiler, command, said)
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    assert json.loads((tmp_path / "default" / "r" / "summary.json").read_text())["status"] == "finished"


# -- data and numbers --------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", size=(40, 24))


def spoil_unread(stream: object) -> list[str]:
    """Delete one file of step 1 and replace one of step 2 by rubbish, between scan and read."""
    paths = [Path(stream.images.files.name(int(stream.indices(step)[0]))) for step in (1, 2)]  # type: ignore[attr-defined]
    paths[0].unlink()
    paths[1].write_bytes(b"rubbish")
    return [path.name for path in paths]


def test_files_that_vanish_in_the_middle_of_an_epoch_are_replaced_and_named(root: Path, caplog) -> None:
    stream = trainer(*options(root, 0, 0.0, "dataset.max_corrupt=0.1"))
    stream.load_images(0)
    names = spoil_unread(stream)
    for step in range(1, 6):
        images = stream.load_images(step)
        assert images.flatten(1).float().std(1).min() > 0, "no image is blank"
    warned = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
    assert len(warned) == 2
    assert all(name in warning for name, warning in zip(names, warned, strict=True))


def test_files_that_vanish_beyond_the_tolerance_end_the_run(root: Path) -> None:
    stream = trainer(*options(root, 0, 0.0, "dataset.max_corrupt=0.0"))
    stream.load_images(0)
    spoil_unread(stream)
    with pytest.raises(UserError, match=r"1 of 24 images cannot be read.*No such file"):
        stream.load_images(1)


def test_a_decoding_process_that_is_killed_is_one_sentence(root: Path) -> None:
    stream = trainer(*options(root, 2, 0.0, "train.epochs=20"))
    stream.load_images(0)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, match=r"decodes images died.*dataset.workers.*continues a run"):
        list(map(stream.load_images, range(1, stream.num_steps)))
    stream.close()


def test_a_learning_rate_that_explodes_stops_with_the_last_good_state(run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step \d+ is not finite.*optimizer.lr"):
        run("optimizer.lr=1e30", "train.clip_norm=null", "schedule.lr.warmup_epochs=0", "name=r")
    state = torch.load(tmp_path / "default" / "r" / "checkpoints" / "latest.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    summary = json.loads((tmp_path / "default" / "r" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "not finite" in summary["reason"]
