"""Teacher updates: how and when each of them changes the target encoder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hjepa
from hjepa.config.errors import UserError
from hjepa.models.vit import ViTEncoder
from hjepa.optim.schedules import ConstantSchedule
from hjepa.training.teacher import EMA
from tests.helpers.runs import build_components, plan, trainer


def weight(encoder: ViTEncoder) -> torch.Tensor:
    return encoder.blocks[0].attn.qkv.weight.detach().clone()


def test_ema_equals_its_formula() -> None:
    model = build_components().model
    model.student.blocks[0].attn.qkv.weight.data += 1
    student, before = model.student.blocks[0].attn.qkv.weight, model.teacher.blocks[0].attn.qkv.weight.clone()
    ema = EMA(ConstantSchedule(start=0.9, end=0.9))
    ema.prepare(plan(1, 1))
    ema.apply(model, 0)
    assert torch.allclose(model.teacher.blocks[0].attn.qkv.weight, 0.9 * before + 0.1 * student, atol=1e-7)


def test_default_momentum_never_reaches_one() -> None:
    ema = build_components().teacher_update
    ema.prepare(plan(1000, 100))
    assert max(ema.momentum) < 1


def test_half_of_the_teacher_is_replaced_after_the_half_life() -> None:
    model = build_components().model
    before = weight(model.teacher)
    model.student.blocks[0].attn.qkv.weight.data += 1
    ema = EMA(ConstantSchedule(start=0.5, end=0.5), half_life=7)
    ema.prepare(plan(7, 1))
    for step in range(7):
        ema.apply(model, step)
    assert torch.allclose(weight(model.teacher), before + 0.5, atol=1e-5)


@pytest.mark.parametrize("interval", [("teacher.epochs=null", "teacher.steps=3"), ("teacher.epochs=0.5", "train.batch_size=36")])
def test_periodic_copy_copies_the_student_only_at_its_intervals(interval: tuple[str, str]) -> None:
    t = trainer("teacher=refresh", *interval, "schedule.lr.warmup_epochs=0")
    old = weight(t.model.teacher)
    for step in range(2):
        t.train_step(t.get_batch(step), step)
        assert torch.equal(weight(t.model.teacher), old)
    t.train_step(t.get_batch(2), 2)
    assert torch.equal(weight(t.model.teacher), weight(t.model.student))
    assert not torch.equal(weight(t.model.teacher), old)


def test_without_a_teacher_gradients_flow_through_both_sides() -> None:
    components = build_components("teacher=none", "levels=flat", "regularizer=none")
    model = components.model
    assert "teacher" not in model.parameter_counts()
    images, masks = torch.randn(2, 3, 32, 32), components.sampler(2, torch.Generator().manual_seed(0))
    assert model(images, masks).levels[0].target.requires_grad
    with_teacher = build_components("levels=flat", "regularizer=none").model
    assert not with_teacher(images, masks).levels[0].target.requires_grad


def frozen_step(*overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
    t = trainer("teacher=frozen", "schedule.lr.warmup_epochs=0", *overrides)
    before = weight(t.model.teacher)
    t.train_step(t.get_batch(0), 0)
    return before, weight(t.model.teacher)


def test_a_frozen_teacher_has_the_weights_of_its_source_and_keeps_them(run, tmp_path: Path) -> None:
    run("name=source", "seed=5", "train.epochs=1")
    source = tmp_path / "default" / "source"
    expected = torch.load(source / "checkpoints" / "latest.pt", weights_only=True)["model"]["teacher.blocks.0.attn.qkv.weight"]
    for weights in (source, source / "checkpoints" / "latest.pt"):
        before, after = frozen_step(f"teacher.weights={weights}")
        assert torch.equal(before, expected)
        assert torch.equal(after, expected)


def test_the_student_of_a_frozen_teacher_is_what_is_measured_and_evaluated(run, tmp_path: Path) -> None:
    source = "name=source", "seed=5", "train.epochs=1"
    run(*source)
    run("name=r", "teacher=frozen", f"teacher.weights={tmp_path}/default/source", "optimizer.lr=0.01")
    folder = tmp_path / "default" / "r"
    weights = torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["model"]
    loaded = hjepa.load(folder, checkpoint="latest").encoder.state_dict()["blocks.0.attn.qkv.weight"].cpu()
    assert torch.equal(loaded, weights["student.blocks.0.attn.qkv.weight"])
    assert not torch.equal(loaded, weights["teacher.blocks.0.attn.qkv.weight"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spreads = [record["student/std"] for record in records if "student/std" in record]
    assert len(set(spreads)) > 1, "the student changes"
    pretrained, teacher = (build_components(option).model for option in (f"model.pretrained={folder}", f"init_from={folder}"))
    for model in (pretrained, teacher):
        assert torch.equal(weight(model.student), weight(model.teacher))
    assert not torch.equal(weight(pretrained.student), weights["teacher.blocks.0.attn.qkv.weight"])


@pytest.mark.thorough
def test_a_frozen_teacher_includes_the_teachers_of_stacked_levels(run, tmp_path: Path) -> None:
    run("name=source", "seed=5", "train.epochs=1", "levels=stacked")
    source = tmp_path / "default" / "source"
    expected = torch.load(source / "checkpoints" / "best.pt", weights_only=True)["model"]["upper.teacher.embed.weight"]
    t = trainer("levels=stacked", "teacher=frozen", f"teacher.weights={source}", "schedule.lr.warmup_epochs=0")
    t.train_step(t.get_batch(0), 0)
    assert torch.equal(t.model.upper.teacher.embed.weight, expected)
    run("name=flat", "train.epochs=1", "levels=flat")
    with pytest.raises(UserError, match=r"it lacks upper\.teacher"):
        build_components("levels=stacked", "teacher=frozen", f"teacher.weights={tmp_path}/default/flat")


def test_a_frozen_teacher_can_be_a_timm_checkpoint(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(3)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 64, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", **options)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    for name in ("vit.safetensors", "vit.pth"):
        teacher = build_components("teacher=frozen", f"teacher.weights={tmp_path / name}").model.teacher
        assert torch.equal(teacher.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
        assert teacher.pos_embed.shape == (1, 64, 32), "the position embeddings are resampled for the other grid"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=refresh", "teacher.steps=3"], "teacher.epochs=1 and teacher.steps=3: set exactly one"),
        (["teacher.half_life=0"], "teacher.half_life=0"),
        (["teacher=frozen", "teacher.weights=/nowhere"], "teacher.weights=/nowhere: no such file"),
        (["levels=none", "masking=none", "regularizer=none"], "nothing to minimize"),
    ],
)
def test_invalid_options_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_components(*overrides)
