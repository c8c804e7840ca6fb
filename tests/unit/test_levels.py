"""Levels: two-dimensional pooling, and targets without learned parameters."""

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.models.levels import Levels, pool_cells
from hjepa.models.vit import ViTEncoder
from tests.helpers.runs import build_components


def test_pooling_is_two_dimensional() -> None:
    tokens = torch.randn(2, 64, 5)
    pooled = pool_cells(tokens, 8, 2)
    image = tokens.transpose(1, 2).unflatten(2, (8, 8))
    assert torch.allclose(pooled, F.avg_pool2d(image, 2).flatten(2).transpose(1, 2), atol=1e-6)


def test_targets_written_out() -> None:
    parts = build_components("levels=depth", "levels.pool=[1,2]")
    model, images = parts.model.eval(), torch.randn(2, 3, 32, 32)
    masks = parts.sampler(2, torch.Generator().manual_seed(0))
    middle, last = (stage.cells for stage in model.teacher(images, layers=[level.layer for level in reversed(model.levels)]))
    fine, coarse = model(images, masks).levels
    patches, cells = masks.targets[0].flatten(1), masks.targets[1].flatten(1)
    torch.testing.assert_close(fine.target[1, 0], F.layer_norm(last[1, patches[1]], (32,)))
    row, column = divmod(int(cells[0, 0]), 4)  # a cell of the 4x4 grid of 2x2 patches
    inside = [(2 * row + i) * 8 + 2 * column + j for i in range(2) for j in range(2)]
    torch.testing.assert_close(coarse.target[0, 0, 0], F.layer_norm(middle[0, inside].mean(0), (32,)))


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
    parts.model.predictor.register_forward_pre_hook(lambda _, args: inputs.append((args[0].tokens.shape[1], args[0].places)))
    parts.model(images, masks)
    assert inputs[0][0] == 4 + masks.context.shape[2]
    assert inputs[1] == (4, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": [-1], "pool": [1, 2]}, "one entry per level"),
        ({"stage": [-1, -1], "pool": [2, 3]}, r"levels.pool=\[2, 3\] does not fit the grid of 8x8 of block 2"),
        ({"stage": [-1], "pool": [8]}, "leave at least 2x2 cells"),
        ({"stage": [3]}, "ViTEncoder has the layers 1 to 2"),
        ({"stage": [-3]}, "-1 to -2 counted from the last layer"),
        ({"stage": [1.0]}, r"levels.stage=1.0: .* or a fraction of their number between 0 and 1"),
        ({"stage": [0]}, "levels.stage=0"),
        ({"summary": 1.0}, "summary tokens"),
        ({"view": ["same", "other"]}, "one entry for all levels, or one per level"),
        ({"pool": ["whole"]}, r"levels.pool=whole needs targets in another view, but levels.view=\['same'\]"),
        ({"predictor": ["matching"]}, "levels.predictor=matching needs targets in another view"),
        ({"loss": {"level2": None}}, "levels.loss.level2 names no level; the levels are level1"),
    ],
)
def test_contradicting_levels_are_refused(options: dict[str, list], message: str) -> None:
    encoder = ViTEncoder(image_size=32, patch_size=4, dim=8, depth=2, heads=2)
    levels = {"stage": [-1], "pool": [1], **options}
    with pytest.raises(UserError, match=message):
        Levels(weight=[1.0] * len(levels["stage"]), **levels).resolve(encoder)


@pytest.mark.parametrize(("stage", "layer"), [(1, 1), (12, 12), (-1, 12), (-12, 1), (0.5, 6), (0.01, 1), (0.99, 12)])
def test_stages_are_counted_from_either_end_or_as_a_fraction(stage: int | float, layer: int) -> None:
    encoder = ViTEncoder(image_size=32, patch_size=4, dim=8, depth=12, heads=2)
    assert Levels([stage], [1], [1.0]).resolve(encoder)[0].layer == layer


@pytest.mark.parametrize(
    ("option", "value"),
    [("stage", ["last"]), ("pool", [0]), ("pool", ["all"]), ("view", ["both"]), ("weight", [-1.0]), ("summary", -1.0)],
)
def test_values_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(UserError, match=f"levels.{option}"):
        check_node("levels", {"_target_": "hjepa.models.Levels", option: value})
