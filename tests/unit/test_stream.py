"""Streamed images give the same batches, runs and error messages as images in memory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.config.schema import check, resolve
from hjepa.data import image_files as files_module
from hjepa.data.datamodule import Split
from hjepa.metrics.probes import subset
from tests.helpers.results import metrics, wait_for_records, weights
from tests.helpers.runs import ROOT, compose, tiny, trainer
from tests.unit.test_data import folder, make_folder, spoil


def options(root: Path, workers: int | None, limit: float = 0.0, *more: str) -> list[str]:
    """Return the overrides of a tiny run on a folder, which is streamed unless its images fit into the limit."""
    numbers = (f"dataset.memory_limit_gb={limit}", f"dataset.workers={'null' if workers is None else workers}")
    shape = ("dataset.image_size=16", "dataset.validation=0.25", "train.batch_size=6", "probe.train_images=10")
    return ["dataset=image_folder", f"dataset.root={root}", *numbers, *shape, *more]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write 24 JPEGs of three classes, larger than the images of the run."""
    return make_folder(tmp_path / "images", size=(40, 24))


@pytest.mark.parametrize("workers", [0, 1, 2, None])
def test_batches_equal_those_in_memory_from_any_step_on(root: Path, workers: int | None) -> None:
    memory, stream = trainer(*options(root, 0, 1.0)), trainer(*options(root, workers))
    assert (memory.num_steps, len(memory.images)) == (stream.num_steps, len(stream.images)) == (6, 18)
    for step in (*range(6), 4, 5, 1, 2, 0):
        a, b = memory.get_batch(step).global_crops, stream.get_batch(step).global_crops
        assert torch.equal(a, b), step
    stream.close()


def test_every_epoch_holds_every_image_once_in_another_order(root: Path) -> None:
    stream = trainer(*options(root, 1))
    epochs = [torch.cat([stream.indices(step) for step in range(3 * e, 3 * e + 3)]) for e in (0, 1)]
    assert epochs[0].sort().values.tolist() == epochs[1].sort().values.tolist() == list(range(18))
    assert not torch.equal(*epochs)
    images = torch.cat([stream.load_images(step) for step in range(3)])
    assert torch.equal(images, stream.images.files[epochs[0]])
    stream.close()


def test_prefetching_does_not_touch_the_global_generator(root: Path) -> None:
    stream = trainer(*options(root, 1))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream.load_images(0)
    assert torch.equal(before, torch.get_rng_state())
    stream.close()


def test_a_streamed_run_equals_one_in_memory_bit_for_bit(root: Path, run, tmp_path: Path) -> None:
    runs = {"memory": options(root, 0, 1.0), "stream": options(root, 2)}
    scores = {name: run(*overrides, f"name={name}") for name, overrides in runs.items()}
    assert scores["memory"] == scores["stream"]
    a, b = (tmp_path / "default" / name for name in runs)
    assert metrics(a) == metrics(b)
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_where_images_are_decoded_does_not_change_the_identity_of_a_run(root: Path, run, tmp_path: Path, capsys) -> None:
    assert run(*options(root, 0, 1.0)) == run(*options(root, 2))
    assert "overwrite=true" in capsys.readouterr().out, "the second start finds the finished run"


@pytest.mark.thorough
def test_sigterm_to_the_whole_group_saves_and_the_same_command_gives_the_same_bits(root: Path, run, tmp_path: Path) -> None:
    long = ("train.epochs=12", "train.log_every=1", "probe.every=100", "experiment_name=e", "name=r")
    command = tiny(*options(root, 2, 0.0, *long), f"output_root={tmp_path}")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *command],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    wait_for_records(tmp_path / "e" / "r", 5, lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert json.loads((tmp_path / "e" / "r" / "summary.json").read_text())["status"] == "stopped"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left behind
    run(*options(root, 1, 0.0, *long))
    run(*options(root, 0, 1.0, *long), "name=uninterrupted")
    assert metrics(tmp_path / "e" / "r") == metrics(tmp_path / "e" / "uninterrupted")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_as_in_memory_and_named(root: Path, workers: int, caplog) -> None:
    spoil(root / "class1" / "4.jpg", root / "class2" / "6.jpg")  # both are training images
    tolerant = "dataset.max_corrupt=0.1"
    memory, stream = trainer(*options(root, 0, 1.0, tolerant)), trainer(*options(root, workers, 0.0, tolerant))
    caplog.clear()
    for step in range(6):
        assert torch.equal(memory.load_images(step), stream.load_images(step))
    named = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert 1 <= len(named) <= 2, "each file is named once"
    assert "class1/4.jpg" in "".join(named)
    assert "class2/6.jpg" in "".join(named)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images_end_the_run(root: Path, workers: int) -> None:
    for file in (root / "class0").iterdir():
        file.write_bytes(b"no image")
    stream = trainer(*options(root, workers, 0.0, "dataset.max_corrupt=0.2"))
    with pytest.raises(UserError, match=r"of 24 images cannot be read, more than dataset.max_corrupt=0.2 allows.*class0"):
        list(map(stream.load_images, range(6)))
    stream.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_worker_is_not_hidden(root: Path, monkeypatch, workers: int) -> None:
    def raise_bug(*_: object) -> None:
        raise RuntimeError("a bug")

    stream = trainer(*options(root, workers))
    monkeypatch.setattr(files_module.ImageFiles, "decode", raise_bug)
    with pytest.raises(RuntimeError, match="a bug"):
        stream.load_images(0)
    stream.close()


def test_only_indexed_images_are_decoded(root: Path, monkeypatch) -> None:
    decoded = []
    read = files_module.read_image
    monkeypatch.setattr(files_module, "read_image", lambda *args: decoded.append(args[0]) or read(*args))
    train, held = folder(root, memory_limit_gb=0.0).train_and_validation()
    assert (len(train), len(held), decoded) == (18, 6, [])
    assert held.images[:4].shape == (4, 3, 16, 16)
    assert len(decoded) == 4
    chosen = subset(train, 5)
    assert (len(chosen), len(decoded)) == (5, 9)
    assert isinstance(chosen.images, torch.Tensor)
    in_memory, _ = folder(root).train_and_validation()
    same = subset(Split(in_memory.images, in_memory.labels), 5)
    assert torch.equal(chosen.images, same.images)
    assert torch.equal(chosen.labels["class"], same.labels["class"])


def test_a_streamed_run_decodes_no_more_than_it_uses(root: Path, run, monkeypatch) -> None:
    """Only the check of the images, the preview, the monitor and the probe decode into memory; training images are streamed."""
    counts = []
    index = files_module.ImageFiles.__getitem__
    monkeypatch.setattr(files_module.ImageFiles, "__getitem__", lambda self, i: counts.append(len(out := index(self, i))) or out)
    run(*options(root, 1, 0.0, "probe.validation_images=3"))
    assert sorted(counts) == [3, 4, 6, 6, 10]


@pytest.mark.parametrize("option", ["imagenet1k", "imagenet100", "mixture"])
def test_dataset_options_compose(option: str) -> None:
    root = ["dataset.roots=[a,b]", "dataset.weights=[3,1]"] if option == "mixture" else ["dataset.root=a"]
    config = resolve(compose(f"dataset={option}", *root, "dataset.augment.jitter=0.8"))
    check(config)
    assert config["dataset"]["image_size"] == (32 if option == "mixture" else 224)
