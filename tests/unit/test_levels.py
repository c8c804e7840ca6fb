"""Levels: two-dimensional pooling, and targets without learned parameters."""

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.models.encoder import Stage
from hjepa.models.levels import Levels, pool_cells
from tests.helpers.runs import build_components


def test_pooling_is_two_dimensional() -> None:
    tokens = torch.randn(2, 64, 5)
    pooled = pool_cells(tokens, 8, 2)
    image = tokens.transpose(1, 2).unflatten(2, (8, 8))
    assert torch.allclose(pooled, F.avg_pool2d(image, 2).flatten(2).transpose(1, 2), atol=1e-6)


def test_targets_written_out() -> None:
    levels = Levels([0.5, 1.0], [1, 2], [1.0, 1.0])
    stages = {layer: Stage(torch.randn(2, 17, 6), grid=4, num_summary=1) for layer in (1, 2)}
    masks = [torch.tensor([[[[0, 5]]], [[[3, 15]]]]), torch.tensor([[[[1]]], [[[2]]]])]
    fine, coarse = levels.targets(stages, masks, grid=4, num_layers=2)
    assert torch.allclose(fine[1, 0, 0, 1], F.layer_norm(stages[1].cells[1, 15], (6,)), atol=1e-6)
    cell = stages[2].cells[0, [2, 3, 6, 7]].mean(0)  # cell 1 of the 2x2 grid of 2x2 patches
    assert torch.allclose(coarse[0, 0, 0, 0], F.layer_norm(cell, (6,)), atol=1e-6)


@pytest.mark.parametrize("option", ["flat", "pyramid", "depth", "summary"])
def test_no_trainable_parameter_touches_a_target(option: str) -> None:
    parts = build_components(f"levels={option}")
    images = torch.randn(2, 3, 32, 32)
    output = parts.model(images, parts.sampler(2, torch.Generator().manual_seed(0)))
    trainable = {id(p) for p in parts.model.parameters() if p.requires_grad}
    assert not trainable & {id(p) for p in parts.model.teacher.parameters()}
    for level in output.levels:
        assert not level.target.requires_grad
        assert level.prediction.requires_grad
        assert torch.allclose(level.target.mean(-1), torch.zeros(()), atol=1e-5), "layer norm without affine parameters"
        assert level.prediction.shape == level.target.shape


def test_summary_pass_sees_summary_tokens_only() -> None:
    parts = build_components("levels=summary")
    images, masks = torch.randn(2, 3, 32, 32), parts.sampler(2, torch.Generator().manual_seed(0))
    inputs = []
    parts.model.predictor.register_forward_pre_hook(lambda _, args: inputs.append((args[0].shape[1], args[1])))
    parts.model(images, masks)
    assert inputs[0][0] == 4 + masks.context.shape[2]
    assert inputs[1] == (4, None)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (lambda: Levels([1.0], [1, 2], [1.0]), "one entry per level"),
        (lambda: Levels([1.0, 1.0], [2, 3], [1.0, 1.0]), "divide the largest"),
        (lambda: Levels([1.0], [1], [1.0], summary=1.0), "summary_tokens"),
        (lambda: Levels([1.0, 1.0], [1, 4], [1.0, 1.0]).check_grid(6), "does not fit"),
        (lambda: Levels([1.0], [4], [1.0]).check_grid(4), "does not fit"),
    ],
)
def test_contradicting_levels_are_refused(levels, message: str) -> None:
    with pytest.raises(UserError, match=message):
        levels()


@pytest.mark.parametrize(("option", "value"), [("depth", [1.5]), ("pool", [0]), ("weight", [-1.0]), ("summary", -1.0)])
def test_values_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"levels.{option}"):
        check_node("levels", {"_target_": "hjepa.models.Levels", option: value})
