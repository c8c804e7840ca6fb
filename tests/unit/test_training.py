"""The order of schedule, update and teacher within a step, gradient accumulation, means, memory, and stops on errors."""

import gc
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.config.terminal import progress_bar
from hjepa.distributed.device import to_device
from hjepa.distributed.process_group import World
from hjepa.losses import VICReg
from hjepa.optim.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, WSDSchedule
from hjepa.training.meter import Meter
from hjepa.training.signals import StopFlag
from tests.helpers.runs import build_components, plan, trainer

STACKED_VIEWS = (
    "levels.view=[other]",
    "levels.project=[true]",
    "levels.predictor=[matching]",
    "masking=none",
    "projector=mlp",
    "dataset.views=2",
)


def test_schedules_equal_their_formulas() -> None:
    values = CosineSchedule(start=1.0, end=0.1, warmup_steps=4)(plan(24, 10))
    assert values[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert values[-1] == pytest.approx(0.1)
    assert all(values[4 + t] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * t / 19)) / 2) for t in range(20))
    assert LinearSchedule(start=0.0, end=1.0)(plan(5, 1)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ConstantSchedule(start=0.3, end=9.0, warmup_epochs=0.5)(plan(6, 4)) == [0.0, 0.15, 0.3, 0.3, 0.3, 0.3]
    assert WSDSchedule(start=1.0, end=0.0, warmup_steps=2, decay=0.5)(plan(9, 3)) == pytest.approx(
        [0, 0.5, 1, 1, 1, 1, 2 / 3, 1 / 3, 0]
    )
    assert ConstantSchedule(start=0.3, end=9.0, warmup_ratio=0.5)(plan(6, 4)) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3, 0.3])
    assert len(CosineSchedule(start=1.0, end=0.0, warmup_epochs=50)(plan(10, 10))) == 10, "a long warm-up is cut off"


@pytest.mark.parametrize("length", [{"warmup_epochs": 0.0}, {"warmup_steps": 0}])
def test_a_length_in_epochs_or_steps_replaces_the_fraction(length: dict[str, Any]) -> None:
    expected = CosineSchedule(start=1.0, end=0.0)
    assert CosineSchedule(start=1.0, end=0.0, warmup_ratio=0.5, **length)(plan(10, 2)) == expected(plan(10, 2))


@pytest.mark.parametrize("steps", [5, 0])
def test_warmup_in_both_units_is_refused(steps: int) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        CosineSchedule(start=1.0, end=0.0, warmup_epochs=1, warmup_steps=steps)


def test_learning_rates_are_set_before_the_update() -> None:
    """The warm-up starts at 0, so step 0 must change neither student nor teacher."""
    t = trainer("schedule.lr.warmup_epochs=1")
    before = [p.clone() for p in t.model.parameters()]
    t.train_step(t.get_batch(0), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))
    t.train_step(t.get_batch(1), 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))
    assert t.components.optimizer.param_groups[0]["lr"] == t.learning_rates[""][1] > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_teacher_moves_once_per_step_after_the_update(accumulate: int) -> None:
    t = trainer("schedule.lr.warmup_epochs=0", f"train.accumulate={accumulate}")
    old = t.model.teacher.blocks[0].attn.qkv.weight.clone()
    t.train_step(t.get_batch(0), 0)
    new_student = t.model.student.blocks[0].attn.qkv.weight
    m = t.components.teacher_update.momentum[0]
    assert torch.allclose(t.model.teacher.blocks[0].attn.qkv.weight, m * old + (1 - m) * new_student, atol=1e-7)


def test_accumulation_equals_the_large_batch() -> None:
    results = []
    for accumulate in (1, 4):
        t = trainer(f"train.accumulate={accumulate}", "schedule.lr.warmup_epochs=0", "optimizer.eps=1e-3", "regularizer=none")
        terms = [t.train_step(t.get_batch(i), i) for i in range(3)]
        results.append(([p.detach() for p in t.model.parameters()], terms))
    (weights, terms), (split_weights, split_terms) = results
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, split_weights, strict=True))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for a, b in zip(terms, split_terms, strict=True) for k in a)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    def weights(seed: int) -> torch.Tensor:
        t = trainer(f"seed={seed}", "model.encoder.drop_path=0.2")
        for i in range(3):
            t.train_step(t.get_batch(i), i)
        return torch.cat([p.detach().flatten() for p in t.model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_an_epoch_contains_every_image_once() -> None:
    t = trainer("train.batch_size=44")
    assert len(t.images) == 220 == 5 * 44
    for epoch in range(2):
        seen = torch.cat([t.indices(epoch * 5 + i) for i in range(5)])
        assert torch.equal(seen.sort().values, torch.arange(220))
    assert not torch.equal(t.indices(0), t.indices(5))


def test_weight_decay_does_not_apply_to_norms_biases_and_tokens() -> None:
    components = build_components("levels=summary", "model.encoder.positions=learned")
    names = {id(p): name for name, p in components.model.named_parameters()}
    decayed, others = (
        {names[id(p)] for group in components.optimizer.param_groups if group["decay"] == decay for p in group["params"]}
        for decay in (True, False)
    )
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"student.reg_token", "student.pos_embed", "predictor.mask_tokens"} <= others
    assert decayed | others == {name for name, p in components.model.named_parameters() if p.requires_grad}


def test_the_reported_gradient_norm_is_the_one_before_clipping() -> None:
    clipped = trainer("train.clip_norm=1e-6")
    unclipped = trainer("train.clip_norm=null")
    norms = [x.train_step(x.get_batch(0), 0)["gradient_norm"] for x in (clipped, unclipped)]
    assert torch.allclose(*norms)
    assert norms[0] > 1e-3


def test_gradients_that_overflow_float16_skip_the_step_and_lower_the_scale() -> None:
    t = trainer("schedule.lr.warmup_epochs=0")
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.detach().clone() for p in t.model.student.parameters()]
    t.meter.add(t.train_step(t.get_batch(0), 0))
    t.check_finite()
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.student.parameters(), strict=True))
    assert t.scaler.get_scale() == 2.0**126
    t.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    t.scaler.scale(torch.zeros(()))
    with pytest.raises(UserError, match=r"hardware.precision=float16: .* even at a loss scale of 0\.5"):
        t.check_finite()


def test_the_speed_after_a_resume_counts_the_steps_since_then(monkeypatch) -> None:
    class RecordedError(Exception):
        pass

    def record(values: dict[str, Any]) -> None:
        speeds.append(values["images_per_second"])
        raise RecordedError

    t, speeds = trainer("train.log_every=4", "schedule.lr.warmup_epochs=0"), []
    never = SimpleNamespace(due=bool, requeue=False, __bool__=bool)
    for start in (0, 3):
        ticks = itertools.count()
        monkeypatch.setattr("hjepa.training.trainer.time", SimpleNamespace(perf_counter=lambda ticks=ticks: next(ticks)))
        t.completed_steps, t.seconds = start, 0.0
        with pytest.raises(RecordedError), progress_bar(total=8, disable=True) as bar:
            t.run_steps(None, never, record, StopFlag(), bar)
    assert speeds[0] == speeds[1] == 24


def test_meter_means_are_means_not_last_values() -> None:
    meter = Meter(World())
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value, requires_grad=True)})
    assert meter.interval_means() == {"loss": 3.0}
    meter.add({"loss": torch.tensor(3.0)})
    assert meter.interval_means() == {"loss": 3.0}
    assert meter.epoch_means() == {"loss": 3.0}
    assert meter.epoch_means() == {}


@pytest.mark.thorough
def test_terms_hold_no_graph_and_memory_stays_bounded() -> None:
    t = trainer("train.log_every=1000000")

    def graphs() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())

    def tensors() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    for i in range(10):
        t.meter.add(t.train_step(t.get_batch(i % 18), i % 18))
    held = tensors()
    for i in range(100):
        t.meter.add(t.train_step(t.get_batch(i % 18), i % 18))
    assert graphs() == 0
    assert tensors() - held <= 100 * 8 + 1000, "each step holds one row of terms and nothing else"


class FailingRegularizer(VICReg):
    """VICReg, but not a number in the 13th step."""

    num_calls = 0

    def terms(self, features: torch.Tensor, num_global: int) -> dict[str, torch.Tensor]:
        type(self).num_calls += 1
        factor = math.nan if self.num_calls == 13 else 1.0
        return {name: factor * value for name, value in super().terms(features, num_global).items()}


def test_a_nan_stops_the_run_names_the_batch_and_leaves_a_good_checkpoint(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hjepa.losses.VICReg", FailingRegularizer)
    with pytest.raises(UserError, match=r"step 12 is not finite.*\[\d+, \d+"):
        run("name=nan_", "regularizer=vicreg", "regularizer.levels=[1]")
    folder = tmp_path / "default" / "nan_"
    state = torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)
    assert state["step"] == 9, "the end of the first epoch"
    assert all(value.isfinite().all() for value in state["model"].values())
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=5000", "train.batch_size=5000: expected at most 220"),
        ("train.accumulate=5", "cannot be divided into 5 equal parts"),
        ("train.steps=4", "set exactly one of them, the other to null"),
        ("train.epochs=0", "train.epochs=0: expected PositiveInt"),
        ("train.log_every=0", "train.log_every=0: expected PositiveInt"),
    ],
)
def test_invalid_lengths_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(override)


@pytest.mark.parametrize("options", [["loss=infonce", "regularizer=none"], ["regularizer=vicreg"]])
def test_parts_of_one_image_are_refused_if_images_are_compared(options: list[str]) -> None:
    with pytest.raises(UserError, match=r"train.accumulate=24 parts of a batch of 24 have one image each"):
        build_components("train.accumulate=24", *options)
    build_components("train.accumulate=24", "regularizer=none")


def test_histograms_of_a_divided_model_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.histograms=2 needs complete weights"):
        build_components("train.histograms=2", "hardware.shard=true")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["levels=none", "regularizer=sigreg", "regularizer.levels=[0,1]"], "a factor for level 2, but there are 1 levels"),
        (["levels=stacked", *STACKED_VIEWS, "dataset.early_size=16"], r"dataset.early_size=16: masks and stacked levels"),
        (["levels=stacked", *STACKED_VIEWS, "levels.stage=[0.5]", "regularizer=none"], "no level trains the last stage"),
        (["levels=flat", "levels.stage=[1.5]"], "expected one of these numbers"),
    ],
)
def test_levels_that_do_not_fit_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_components(*options)


def test_losses_are_computed_in_float32() -> None:
    t = trainer("hardware.precision=bfloat16", "schedule.lr.warmup_epochs=0")
    assert {value.dtype for value in t.train_step(t.get_batch(0), 0).values()} == {torch.float32}


def test_every_option_of_the_groups_takes_a_step() -> None:
    groups = {
        "levels": ("flat", "pyramid", "depth", "summary", "pyramid_summary"),
        "regularizer": ("none", "vicreg", "sigreg", "infonce"),
        "teacher": ("ema", "refresh", "none"),
        "projector": ("mlp",),
        "masking": ("multiblock", "block", "random", "partition", "hierarchical"),
        "loss": ("smooth_l1", "mse", "cosine"),
        "schedule": ("cosine", "linear", "constant", "wsd"),
    }
    options = [[f"{group}={option}" for option in names] for group, names in groups.items()]
    for chosen in itertools.zip_longest(*options):  # one option of each group at a time; the default where there is none left
        overrides = [override for override in chosen if override]
        t = trainer(*overrides)
        terms = t.train_step(t.get_batch(1), 1)
        assert all(value.isfinite() for value in terms.values()), overrides


def test_bfloat16_on_a_cpu_is_near_float32_and_attends_in_float32() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        t = trainer(f"hardware.precision={precision}")
        losses[precision] = [t.train_step(t.get_batch(step), step)["loss"].item() for step in range(3)]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    x = torch.randn(2, 3, 4, 8)
    with t.components.hardware.autocast():
        assert F.linear(x, torch.randn(8, 8)).dtype == torch.bfloat16
        attended = F.scaled_dot_product_attention(x, x, x)
    assert torch.equal(attended, F.scaled_dot_product_attention(x, x, x))


def test_only_cuda_goes_on_before_a_copy_has_read_its_source() -> None:
    tensor = Mock(spec=torch.Tensor)
    for device in ("cpu", "mps", "cuda"):
        to_device(tensor, torch.device(device))
        tensor.to.assert_called_with(torch.device(device), non_blocking=device == "cuda")


def test_recomputed_blocks_that_drop_paths_are_refused_on_apple_gpus() -> None:
    components = build_components("model.encoder.drop_path=0.1", "hardware.activation_checkpointing=true")
    components.hardware.device = torch.device("mps")
    with pytest.raises(UserError, match=r"hardware.activation_checkpointing=true cannot drop the same paths again"):
        components.hardware.prepare_model(components.model, [])
