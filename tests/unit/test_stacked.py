"""Stacked levels have their own encoder, teacher, predictor and masks over the representation of the level below."""

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.models.levels import pool_cells
from hjepa.tasks.trained_run import model_layers
from tests.helpers.runs import build_components, trainer
from tests.unit.test_masking import check_contract

SMALL = ("levels=stacked", "levels.upper.dim=16", "levels.upper.heads=2", "levels.upper.predictor.dim=12")


def stacked_loss(parts, images, masks) -> torch.Tensor:
    level = parts.model(images, masks).levels[-1]
    assert level.name.startswith("stacked")
    return F.mse_loss(level.prediction, level.target)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_reach_the_level_below_only_without_detach(detach: bool) -> None:
    parts = build_components(*SMALL, f"levels.upper.detach={detach}")
    images, masks = torch.randn(2, 3, 32, 32), parts.sampler(2, torch.Generator().manual_seed(0))
    stacked_loss(parts, images, masks).backward()
    assert parts.model.upper.student.embed.weight.grad.abs().sum() > 0
    assert (parts.model.student.patch_embed.proj.weight.grad is None) == detach
    assert all(p.grad is None for p in (*parts.model.teacher.parameters(), *parts.model.upper.teacher.parameters()))


def test_a_detached_level_trains_nothing_below_it_if_the_student_is_its_own_teacher() -> None:
    parts = build_components(*SMALL, "teacher=none")
    images, masks = torch.randn(2, 3, 32, 32), parts.sampler(2, torch.Generator().manual_seed(0))
    stacked_loss(parts, images, masks).backward()
    assert parts.model.upper.student.embed.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in parts.model.student.parameters())


def test_upper_target_written_out() -> None:
    """The target is the layer-normalized output of the upper teacher for 2x2 means of the lower teacher's patches."""
    parts = build_components(*SMALL)
    model, images = parts.model.eval(), torch.randn(2, 3, 32, 32)
    masks = parts.sampler(2, torch.Generator().manual_seed(0))
    below = model.teacher(images)[-1].tokens.view(2, 4, 2, 4, 2, 32).mean((2, 4)).view(2, 16, 32)
    encoded = F.layer_norm(model.upper.teacher(below), (16,))
    index = masks.stacked[0].targets[0]
    expected = torch.stack([encoded[i][index[i]] for i in range(2)])
    assert torch.allclose(model(images, masks).levels[-1].target.view_as(expected), expected, atol=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_a_level_above_a_frozen_teacher_is_evaluated_on_the_input_that_it_was_trained_on(detach: bool) -> None:
    model, images = build_components(*SMALL, f"levels.upper.detach={detach}").model.eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.set_teacher_kind(given=True)
        below = (model.teacher if detach else model.student)(images)[-1].cells
        expected = model.upper.student(pool_cells(below, 8, 2)).mean(1)
    torch.testing.assert_close(model_layers(model, [2]).features(images)["stacked 1"], expected)


def test_masks_of_a_stacked_level_fulfill_the_contract_on_their_own_grid() -> None:
    masks = build_components(*SMALL).sampler(3, torch.Generator().manual_seed(0))
    check_contract(masks.stacked[0], 4, [1], 3)
    contexts = [piece.stacked[0].context for piece in masks.split(3)]
    assert torch.equal(torch.cat(contexts), masks.stacked[0].context)


def test_the_upper_teacher_starts_equal_to_its_student_and_follows_it() -> None:
    t = trainer(*SMALL, "schedule.lr.warmup_epochs=0")
    student, teacher = t.model.upper.student, t.model.upper.teacher
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    before, m = teacher.embed.weight.clone(), t.components.teacher_update.momentum[0]
    t.train_step(t.get_batch(0), 0)
    assert torch.allclose(teacher.embed.weight, m * before + (1 - m) * student.embed.weight, atol=1e-7)


def test_stacked_levels_can_be_stacked() -> None:
    t = trainer(
        *SMALL,
        *("dataset.image_size=64", "levels.upper.weight=0.5"),
        "levels.upper.upper={_target_: hjepa.models.StackedLevel, _partial_: true, pool: 2, dim: 8, depth: 1, heads: 2, "
        "weight: 1.0, detach: true, upper: null, masking: ${levels.upper.masking}, predictor: ${levels.upper.predictor}}",
    )
    terms = t.train_step(t.get_batch(0), 0)
    assert {"level1", "stacked1", "stacked2"} <= terms.keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("levels.upper.pool=3", "levels.upper.pool=3 does not divide a grid of 8x8"),
        ("levels.upper.heads=3", "heads=3"),
        ("levels={stage: [], pool: [], weight: []}", "needs a level below it"),
    ],
)
def test_contradicting_options_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_components(*SMALL, override)
