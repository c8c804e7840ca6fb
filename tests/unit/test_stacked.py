"""Stacked levels: an encoder, a teacher, a predictor and masks of their own, over the representation below."""

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from tests.helpers.runs import build_components, trainer
from tests.unit.test_masking import check_contract

SMALL = ("levels=stacked", "levels.upper.dim=16", "levels.upper.heads=2", "levels.upper.predictor.dim=12")


def stacked_loss(parts, images, masks) -> torch.Tensor:
    level = parts.model(images, masks).levels[-1]
    assert level.name.startswith("stacked")
    return F.mse_loss(level.prediction, level.target)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_reach_the_level_below_only_if_not_detached(detach: bool) -> None:
    parts = build_components(*SMALL, f"levels.upper.detach={detach}")
    images, masks = torch.randn(2, 3, 32, 32), parts.sampler(2, torch.Generator().manual_seed(0))
    stacked_loss(parts, images, masks).backward()
    assert parts.model.upper.student.embed.weight.grad.abs().sum() > 0
    assert (parts.model.student.patch_embed.proj.weight.grad is None) == detach
    assert all(p.grad is None for p in (*parts.model.teacher.parameters(), *parts.model.upper.teacher.parameters()))


def test_upper_target_written_out() -> None:
    """The upper teacher over 2x2 means of what the lower teacher says, layer-normalized, at the target cells."""
    parts = build_components(*SMALL)
    model, images = parts.model.eval(), torch.randn(2, 3, 32, 32)
    masks = parts.sampler(2, torch.Generator().manual_seed(0))
    below = model.teacher(images)[-1].view(2, 4, 2, 4, 2, 32).mean((2, 4)).view(2, 16, 32)
    told = F.layer_norm(model.upper.teacher(below), (16,))
    index = masks.stacked[0].targets[0]
    expected = torch.stack([told[i][index[i]] for i in range(2)])
    assert torch.allclose(model(images, masks).levels[-1].target, expected, atol=1e-5)


def test_upper_masks_keep_the_contract_on_their_own_grid() -> None:
    masks = build_components(*SMALL).sampler(3, torch.Generator().manual_seed(0))
    check_contract(masks.stacked[0], 4, [1], 3)
    parts = [part.stacked[0].context for part in masks.split(3)]
    assert torch.equal(torch.cat(parts), masks.stacked[0].context)


def test_upper_teacher_starts_as_its_student_and_follows_it() -> None:
    t = trainer(*SMALL, "schedule.lr.warmup_epochs=0")
    student, teacher = t.model.upper.student, t.model.upper.teacher
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    before, m = teacher.embed.weight.clone(), t.parts.teacher.momentum[0]
    t.train_step(*t.batch(0), 0)
    assert torch.allclose(teacher.embed.weight, m * before + (1 - m) * student.embed.weight, atol=1e-7)


def test_levels_stack_on_stacked_levels() -> None:
    t = trainer(
        *SMALL,
        *("dataset.image_size=64", "levels.upper.weight=0.5"),
        "levels.upper.upper={_target_: hjepa.models.StackedLevel, _partial_: true, pool: 2, dim: 8, depth: 1, heads: 2, "
        "weight: 1.0, detach: true, upper: null, masking: ${levels.upper.masking}, predictor: ${levels.upper.predictor}}",
    )
    terms = t.train_step(*t.batch(0), 0)
    assert {"level1", "stacked1", "stacked2"} <= terms.keys()


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("levels.upper.pool=3", "levels.upper.pool=3 does not cut a 8x8 grid"),
        ("levels.upper.heads=3", "heads=3"),
        ("levels={depth: [], pool: [], weight: []}", "needs a level to stand on"),
    ],
)
def test_what_does_not_fit_is_refused(override: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        build_components(*SMALL, override)
