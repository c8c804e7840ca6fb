"""Starting from weights: `init_from` and `model.pretrained`."""

from pathlib import Path

import pytest
import torch

from hjepa.config.errors import UserError
from tests.helpers.runs import build_components


def test_pretrained_weights_reach_student_and_teacher_and_init_from_the_whole_model(run, tmp_path: Path) -> None:
    run("name=source", "seed=5", "train.epochs=1")
    source = tmp_path / "default" / "source"
    given = torch.load(source / "checkpoints" / "best.pt", weights_only=True)["model"]
    model = build_components(f"model.pretrained={source}").model
    for part in (model.student, model.teacher):
        assert all(torch.equal(value, given[f"teacher.{name}"]) for name, value in part.state_dict().items())
    whole = build_components(f"init_from={source}").model.state_dict()
    assert whole.keys() == given.keys()
    assert all(torch.equal(whole[name], given[name]) for name in whole)


def test_a_run_from_weights_is_another_run(run, tmp_path: Path) -> None:
    run("name=source", "train.epochs=1")
    run("name=next", "train.epochs=1", f"init_from={tmp_path}/default/source")
    with pytest.raises(UserError, match="init_from"):
        run("name=next", "train.epochs=1")


@pytest.mark.parametrize("option", ["init_from", "model.pretrained"])
def test_weights_that_do_not_fit_are_refused_naming_what_differs(run, tmp_path: Path, option: str) -> None:
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
