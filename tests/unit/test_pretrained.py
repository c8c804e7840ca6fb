"""Initial weights from a run: `init_from` and `model.pretrained`."""

from pathlib import Path

import pytest
import torch

from hjepa.config.errors import UserError
from tests.helpers.runs import build_components


def test_pretrained_initializes_student_and_teacher_and_init_from_the_whole_model(run, tmp_path: Path) -> None:
    run("name=source", "seed=5", "train.epochs=1")
    source = tmp_path / "default" / "source"
    weights = torch.load(source / "checkpoints" / "best.pt", weights_only=True)["model"]
    model = build_components(f"model.pretrained={source}").model
    for encoder in (model.student, model.teacher):
        assert all(torch.equal(value, weights[f"teacher.{name}"]) for name, value in encoder.state_dict().items())
    initialized = build_components(f"init_from={source}").model.state_dict()
    assert initialized.keys() == weights.keys()
    assert all(torch.equal(initialized[name], weights[name]) for name in weights)


@pytest.mark.thorough
def test_a_run_with_other_initial_weights_is_another_run(run, tmp_path: Path) -> None:
    run("name=source", "train.epochs=1")
    run("name=next", "train.epochs=1", f"init_from={tmp_path}/default/source")
    with pytest.raises(UserError, match="init_from"):
        run("name=next", "train.epochs=1")


@pytest.mark.thorough
@pytest.mark.parametrize("option", ["init_from", "model.pretrained"])
def test_weights_of_another_shape_are_refused_with_the_names_of_the_parameters(run, tmp_path: Path, option: str) -> None:
    run("name=source", "train.epochs=1")
    source = tmp_path / "default" / "source"
    with pytest.raises(UserError, match=rf"{option}=.*instead of \(16,") as caught:
        build_components(f"{option}={source}", "model.encoder.dim=16", "model.encoder.heads=2")
    assert "\n" not in str(caught.value)
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        build_components(f"{option}={tmp_path}/broken.pt")
    with pytest.raises(UserError, match="nowhere"):
        build_components(f"{option}=/nowhere")
