"""Tasks on a run whose features are those of all stages of a convolutional network."""

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
    "model.features=all",
    "model.patch_size=4",
    "model.encoder.stem=8",
    "model.encoder.dims=[8,16]",
    "model.encoder.residuals=[0,1]",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run."""
    root = tmp_path_factory.mktemp("o")
    options = (*CONV, *(option for option in tiny("levels=flat") if not option.startswith(("model.encoder", "model="))))
    run_config(compose(*options, f"output_root={root}", "train.epochs=1", "dataset.test=200", "probe.every=1", "name=r"))
    return root / "default" / "r"


@pytest.mark.thorough
def test_an_evaluation_has_a_row_per_layer_and_first_the_features_of_the_run(trained: Path) -> None:
    score = evaluate(trained, "protocol=all", *QUICK)
    rows = read_scores(trained)
    every = ["trained/all stages", "trained/stage 2", "trained/stage 1"]
    for protocol, layers in {"linear": every, "knn": every, "quality": every, "dense": every, "fewshot": every[:1]}.items():
        assert [source for source in rows[protocol] if source.startswith("trained")] == layers
    assert score == rows["linear"]["trained/all stages"]["part"]


def test_the_probe_of_training_reads_the_same_features_as_the_evaluation(trained: Path) -> None:
    evaluate(trained, "protocol=[linear,quality]", "task.split=validation", "task.train_images=100", "protocol.quality.images=5")
    rows, probe = read_scores(trained), read_summary(trained)["probe"]
    assert rows["linear"]["trained/all stages"] == {"part": probe["linear"], "whole": probe["linear_whole"]}
    assert rows["quality"]["trained/all stages"]["rankme"] == probe["rankme"]


@pytest.mark.thorough
def test_pictures_include_the_features_of_all_layers(trained: Path) -> None:
    run_config(compose("task=visualize", f"run={trained}", *COMMAND, "task.searched=20"))
    pictures = {Path(name).stem for name in read_summary(trained / "visualize")["pictures"]}
    assert "neighbors-allstages" in pictures
    assert not any(name.startswith("attention") for name in pictures), "convolutions have no attention maps"


@pytest.mark.thorough
def test_an_export_has_the_features_of_all_layers(trained: Path) -> None:
    run_config(compose("task=export", f"run={trained}", *COMMAND, "task.formats=[onnx,torch_export]"))
    summary = read_summary(trained / "export")
    assert {"encoder.onnx", "encoder.pt2"} <= {file.name for file in (trained / "export").iterdir()}
    assert summary["feature_dim"] == 8 + 16
    assert summary["feature_layers"] == ["stage 1", "stage 2"]
    encoder, images = load_run(resolve(compose(f"run={trained}", *COMMAND)), None, None).encoder, torch.rand(3, 3, 32, 32)
    features = hjepa.load(trained, device="cpu").features(images, normalized=True)
    torch.testing.assert_close(features, encoder.features(images).detach())


def test_an_encoder_that_timm_does_not_have_is_exported_in_a_format_of_torch(trained: Path) -> None:
    run_config(compose("task=export", f"run={trained}", *COMMAND))
    files = sorted(file.name for file in (trained / "export").iterdir())
    assert files == ["README.md", "encoder.pt2", "preprocess.json", "summary.json"]
    text = (trained / "export" / "README.md").read_text()
    assert (
        "timm has no model of this architecture, ConvEncoder: use `encoder.pt2` below, which needs nothing but PyTorch." in text
    )
    with pytest.raises(hjepa.UserError, match=r"timm has no model .* of ConvEncoder; use task.formats=\[torch_export\]"):
        run_config(compose("task=export", f"run={trained}", *COMMAND, "task.formats=[timm]"))
    with pytest.raises(hjepa.UserError, match="neither a run folder nor an export with a model of timm"):
        hjepa.load(trained / "export")
