"""A reopened run has the model, the data and the scores of the run that was trained."""

import shutil
from pathlib import Path

import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.config.schema import resolve
from hjepa.models.pretrained import read_checkpoint
from hjepa.tasks.trained_run import TrainedRun, load_run
from tests.helpers.children import launch
from tests.helpers.runs import compose, tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train a run with several checkpoints."""
    root = tmp_path_factory.mktemp("o")
    done = launch(*tiny(f"output_root={root}", "name=r", "checkpoint.last=2", "probe.every=1", "levels=stacked"))
    assert done.returncode == 0, done.stderr
    return root / "default" / "r"


def reopen(folder: Path, checkpoint: str | None = None, root: str | None = None) -> TrainedRun:
    return load_run(resolve(compose(f"run={folder}", "hardware=cpu", "hardware.threads=1", "tracking=none")), checkpoint, root)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [None, "latest", "best", "epoch-00001.pt"])
def test_the_model_has_the_weights_of_the_checkpoint(trained: Path, name: str | None) -> None:
    run = reopen(trained, name)
    stored = read_checkpoint(trained / "checkpoints" / f"{(name or 'best').removesuffix('.pt')}.pt", torch.device("cpu"))
    own = run.model.state_dict()
    assert own.keys() == stored["model"].keys()
    assert all(torch.equal(own[key], value) for key, value in stored["model"].items())
    assert run.step == stored["step"]


def test_probe_scores_of_the_trained_and_the_untrained_network_equal_those_of_the_run(trained: Path) -> None:
    from hjepa.config.instantiate import build
    from hjepa.tracking.run_folder import read_summary

    run, summary = reopen(trained, "latest"), read_summary(trained)
    probe = build(run.config["probe"])
    splits = probe.select_images(*run.dataset.train_and_validation())
    assert probe(run.encoder, *splits, run.dataset.normalize) == summary["probe"]
    assert probe(run.untrained, *splits, run.dataset.normalize) == summary["untrained"]


def test_a_moved_run_can_be_reopened(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "elsewhere")
    assert reopen(tmp_path / "elsewhere").hash == reopen(trained).hash


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
        reopen(tmp_path / "r")
    assert "\n" not in str(error.value)


def test_an_unknown_checkpoint_is_refused_with_the_known_ones(trained: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint .*epoch-00009.pt; this run has .*epoch-00001.*latest"):
        reopen(trained, "epoch-00009")
    with pytest.raises(UserError, match="does not read a folder"):
        reopen(trained, root="/nowhere")
