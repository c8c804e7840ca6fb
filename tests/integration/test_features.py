"""Tasks on runs whose features are those of all layers: a ViT with a stacked level, and a network with stages."""

from pathlib import Path

import pytest
import torch

import hjepa
from hjepa.config.run import run as run_config
from hjepa.config.schema import resolve
from hjepa.tasks.trained_run import load_run
from hjepa.tracking.run_folder import read_summary
from tests.helpers.runs import compose, tiny
from tests.integration.test_evaluate import QUICK, evaluate, read_scores

COMMAND = ("hardware=cpu", "hardware.threads=1", "tracking=none")
CONV = (
    "model=conv_nano",
    "model.patch_size=4",
    "model.encoder.stem=8",
    "model.encoder.dims=[8,16]",
    "model.encoder.residuals=[0,1]",
)
OPTIONS = {
    "blocks": [*tiny("model.features=all", "levels=stacked")],
    "stages": [*CONV, *(option for option in tiny("levels=flat") if not option.startswith("model.encoder"))],
}
DIMS = {"blocks": 32 + 32, "stages": 8 + 16}


@pytest.fixture(scope="module", params=OPTIONS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose layers are blocks or stages."""
    root = tmp_path_factory.mktemp("o")
    options = ("train.epochs=1", "dataset.test=200", "probe.every=1", f"name={request.param}")
    run_config(compose(*OPTIONS[request.param], f"output_root={root}", *options))
    return root / "default" / request.param


def stacked(folder: Path) -> list[str]:
    return ["stacked 1"] if folder.name == "blocks" else []


def test_an_evaluation_has_a_row_per_layer_and_first_the_features_of_the_run(trained: Path) -> None:
    word = trained.name
    score = evaluate(trained, "protocol=all", *QUICK)
    rows = read_scores(trained)
    encoder = [f"all {word}", f"{word[:-1]} 2", f"{word[:-1]} 1"]
    every = [*encoder, *stacked(trained)]
    expected = {"linear": every, "knn": every, "quality": every, "dense": encoder}
    expected |= {"fewshot": [encoder[0], *stacked(trained)], "finetune": encoder[:1]}
    for protocol, layers in expected.items():
        assert [source for source in rows[protocol] if source.startswith("trained")] == [f"trained/{layer}" for layer in layers]
    assert score == rows["linear"][f"trained/all {word}"]["part"]


def test_the_probe_of_training_reads_the_same_features_as_the_evaluation(trained: Path) -> None:
    evaluate(trained, "protocol=[linear,quality]", "task.split=validation", "task.train_images=100", "protocol.quality.images=5")
    rows, probe = read_scores(trained), read_summary(trained)["probe"]
    assert rows["linear"][f"trained/all {trained.name}"] == {"part": probe["linear"], "whole": probe["linear_whole"]}
    assert rows["quality"][f"trained/all {trained.name}"]["rankme"] == probe["rankme"]


def test_pictures_include_the_features_of_all_layers(trained: Path) -> None:
    run_config(compose("task=visualize", f"run={trained}", *COMMAND, "task.searched=20"))
    pictures = {Path(name).stem for name in read_summary(trained / "visualize")["pictures"]}
    assert f"neighbors-all{trained.name}" in pictures
    drawn = {name for name in pictures if name.startswith("attention")}
    assert drawn == ({"attention-block2", "attention-stacked1"} if trained.name == "blocks" else set())


def test_an_export_has_the_features_of_all_layers(trained: Path) -> None:
    formats = "onnx,torch_export,timm" if trained.name == "blocks" else "onnx,torch_export"
    run_config(compose("task=export", f"run={trained}", *COMMAND, f"task.formats=[{formats}]"))
    summary = read_summary(trained / "export")
    assert summary["feature_dim"] == DIMS[trained.name]
    assert summary["feature_layers"] == [f"{trained.name[:-1]} {number}" for number in (1, 2)]
    encoder, images = load_run(resolve(compose(f"run={trained}", *COMMAND)), None, None).encoder, torch.rand(3, 3, 32, 32)
    run = hjepa.load(trained, device="cpu")
    features = run.features(images, normalized=True)
    torch.testing.assert_close(features, encoder.features(images).detach())
    if trained.name == "blocks":
        exported = hjepa.load(trained / "export", device="cpu").features(images, normalized=True)
        torch.testing.assert_close(exported, features, atol=1e-4, rtol=1e-4)
