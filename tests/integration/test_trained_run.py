"""A run that is opened afterwards is the run that was trained."""

import shutil
from pathlib import Path

import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.config.schema import resolve
from hjepa.models.pretrained import read
from hjepa.tasks.trained_run import TrainedRun, load_run
from tests.helpers.runs import compose, launch, tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with several checkpoints."""
    root = tmp_path_factory.mktemp("o")
    done = launch(*tiny(f"output_root={root}", "name=r", "checkpoint.last=2", "probe.every=1", "levels=stacked"))
    assert done.returncode == 0, done.stderr
    return root / "default" / "r"


def opened(folder: Path, checkpoint: str | None = None, root: str | None = None) -> TrainedRun:
    return load_run(resolve(compose(f"run={folder}", "hardware=cpu", "hardware.threads=1", "tracking=none")), checkpoint, root)


@pytest.mark.parametrize("name", [None, "latest", "best", "epoch-00001.pt"])
def test_the_model_is_that_of_the_checkpoint(trained: Path, name: str | None) -> None:
    run = opened(trained, name)
    stored = read(trained / "checkpoints" / f"{(name or 'best').removesuffix('.pt')}.pt", torch.device("cpu"))
    own = run.model.state_dict()
    assert own.keys() == stored["model"].keys()
    assert all(torch.equal(own[key], value) for key, value in stored["model"].items())
    assert run.step == stored["step"]


def test_the_probe_of_an_opened_run_and_of_its_untrained_network_are_the_runs_own(trained: Path) -> None:
    from hjepa.config.instantiate import build
    from hjepa.tracking.run_folder import read_summary

    run, summary = opened(trained, "latest"), read_summary(trained)
    probe = build(run.config["probe"])
    parts = probe.choose(*run.dataset.train_and_validation())
    assert probe(run.encoder, *parts, run.dataset.normalize) == summary["probe"]
    assert probe(run.untrained, *parts, run.dataset.normalize) == summary["untrained"]


def test_a_run_that_was_moved_opens(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "elsewhere")
    assert opened(tmp_path / "elsewhere").hash == opened(trained).hash


def change(folder: Path, old: str, new: str) -> None:
    file = folder / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "stopped before its first one"),
        (lambda folder: (folder / "config.yaml").unlink(), "no config.yaml"),
        (lambda folder: (folder / "config.yaml").write_text("seed: 0\n"), "another version of hjepa"),
        (lambda folder: change(folder, "clip_norm", "clip_norms"), "another version of hjepa"),
        (lambda folder: change(folder, "dim: 32", "dim: 64"), "does not fit the model"),
        (lambda folder: (folder / "checkpoints" / "best.pt").write_bytes(b"PK"), "cannot be read as a checkpoint"),
    ],
)
def test_a_broken_run_is_refused_in_one_sentence(trained: Path, tmp_path: Path, break_it, word: str) -> None:
    shutil.copytree(trained, tmp_path / "r")
    break_it(tmp_path / "r")
    with pytest.raises(UserError, match=word) as error:
        opened(tmp_path / "r")
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(trained: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint .*epoch-00009.pt; choose task.checkpoint among .*epoch-00001.*latest"):
        opened(trained, "epoch-00009")
    with pytest.raises(UserError, match="has no root"):
        opened(trained, root="/nowhere")
