"""Timing of schedule, update, teacher and accumulation; honest means; bounded memory; loud stops."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.distributed.process_group import World
from hjepa.optim.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, WSDSchedule
from hjepa.training.meter import Meter
from tests.helpers.runs import build_components, plan, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_schedules_against_their_formulas() -> None:
    values = CosineSchedule(start=1.0, end=0.1, warmup_steps=4)(plan(24, 10))
    assert values[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert values[-1] == pytest.approx(0.1)
    assert all(values[4 + t] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * t / 19)) / 2) for t in range(20))
    assert LinearSchedule(start=0.0, end=1.0)(plan(5, 1)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ConstantSchedule(start=0.3, end=9.0, warmup_epochs=0.5)(plan(6, 4)) == [0.0, 0.15, 0.3, 0.3, 0.3, 0.3]
    assert WSDSchedule(start=1.0, end=0.0, warmup_steps=2, decay=0.5)(plan(9, 3)) == pytest.approx(
        [0, 0.5, 1, 1, 1, 1, 2 / 3, 1 / 3, 0]
    )
    assert len(CosineSchedule(start=1.0, end=0.0, warmup_epochs=50)(plan(10, 10))) == 10, "a warm-up longer than the run is cut"


def test_warmup_in_both_units_is_refused() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        CosineSchedule(start=1.0, end=0.0, warmup_epochs=1, warmup_steps=5)


def test_rates_are_set_before_the_update() -> None:
    """The warm-up starts at 0: step 0 must move nothing, neither student nor teacher."""
    t = trainer("schedule.lr.warmup_epochs=1")
    before = [p.clone() for p in t.model.parameters()]
    t.train_step(*t.batch(0), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))
    t.train_step(*t.batch(1), 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, t.model.parameters(), strict=True))
    assert t.parts.optimizer.param_groups[0]["lr"] == t.lr[""][1] > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_teacher_moves_once_per_step_after_the_update(accumulate: int) -> None:
    t = trainer("schedule.lr.warmup_epochs=0", f"train.accumulate={accumulate}")
    old = t.model.teacher.blocks[0].attn.qkv.weight.clone()
    t.train_step(*t.batch(0), 0)
    new_student = t.model.student.blocks[0].attn.qkv.weight
    m = t.parts.teacher.momentum[0]
    assert torch.allclose(t.model.teacher.blocks[0].attn.qkv.weight, m * old + (1 - m) * new_student, atol=1e-7)


def test_accumulation_equals_the_large_batch() -> None:
    results = []
    for accumulate in (1, 4):
        t = trainer(f"train.accumulate={accumulate}", "schedule.lr.warmup_epochs=0", "optimizer.eps=1e-3", "regularizer=none")
        terms = [t.train_step(*t.batch(i), i) for i in range(3)]
        results.append(([p.detach() for p in t.model.parameters()], terms))
    (weights, terms), (split_weights, split_terms) = results
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, split_weights, strict=True))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for a, b in zip(terms, split_terms, strict=True) for k in a)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    def weights(seed: int) -> torch.Tensor:
        t = trainer(f"seed={seed}", "model.encoder.drop_path=0.2")
        for i in range(3):
            t.train_step(*t.batch(i), i)
        return torch.cat([p.detach().flatten() for p in t.model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_an_epoch_visits_every_image_once() -> None:
    t = trainer("train.batch_size=44")
    assert len(t.images) == 220 == 5 * 44
    for epoch in range(2):
        seen = torch.cat([t.indices(epoch * 5 + i) for i in range(5)])
        assert torch.equal(seen.sort().values, torch.arange(220))
    assert not torch.equal(t.indices(0), t.indices(5))


def test_weight_decay_spares_norms_biases_and_tokens() -> None:
    parts = build_components("levels=summary", "model.encoder.positions=learned")
    names = {id(p): name for name, p in parts.model.named_parameters()}
    decayed, spared = (
        {names[id(p)] for group in parts.optimizer.param_groups if group["decay"] == decay for p in group["params"]}
        for decay in (True, False)
    )
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"student.reg_token", "student.pos_embed", "predictor.mask_tokens"} <= spared
    assert decayed | spared == {name for name, p in parts.model.named_parameters() if p.requires_grad}


def test_clipping_bounds_the_update_and_reports_the_whole_norm() -> None:
    t = trainer("train.clip_norm=1e-6")
    free = trainer("train.clip_norm=null")
    norms = [x.train_step(*x.batch(0), 0)["gradient_norm"] for x in (t, free)]
    assert torch.allclose(*norms)
    assert norms[0] > 1e-3


def test_meter_means_are_means_not_last_values() -> None:
    meter = Meter(World())
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value, requires_grad=True)})
    assert meter.interval() == {"loss": 3.0}
    meter.add({"loss": torch.tensor(3.0)})
    assert meter.interval() == {"loss": 3.0}
    assert meter.epoch() == {"loss": 3.0}
    assert meter.epoch() == {}


def test_terms_hold_no_graph_and_memory_stays_bounded() -> None:
    t = trainer("train.log_every=1000000")

    def graphs() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())

    def tensors() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    for i in range(10):
        t.meter.add(t.train_step(*t.batch(i % 18), i % 18))
    held = tensors()
    for i in range(300):
        t.meter.add(t.train_step(*t.batch(i % 18), i % 18))
    assert graphs() == 0
    assert tensors() - held <= 300 * 8 + 1000, "one row of terms per step and nothing else"


def test_nan_stops_the_run_with_the_batch_and_a_good_checkpoint(run, tmp_path, monkeypatch) -> None:
    from hjepa.losses import SmoothL1
    from hjepa.training.trainer import Trainer

    original, now = SmoothL1.distance, {"step": -1}
    step = Trainer.train_step

    def counted(self, images, masks, crops, number):
        now["step"] = number
        return step(self, images, masks, crops, number)

    monkeypatch.setattr(Trainer, "step", counted)
    monkeypatch.setattr(SmoothL1, "distance", lambda self, p, t: original(self, p, t) * (math.nan if now["step"] == 12 else 1))
    with pytest.raises(UserError, match=r"step 12 is not finite.*\[\d+, \d+"):
        run("name=nan_")
    state = torch.load(tmp_path / "default" / "nan_" / "checkpoints" / "latest.pt", weights_only=True)
    assert state["step"] == 9, "the end of the first epoch"
    assert all(v.isfinite().all() for v in state["model"].values())
    import json

    assert json.loads((tmp_path / "default" / "nan_" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("train.batch_size=5000", "train.batch_size=5000: expected 1 to 220"),
        ("train.accumulate=5", "cannot be cut into 5 equal parts"),
        ("train.steps=4", "set one to at least 1, the other to null"),
        ("train.epochs=0", "set one to at least 1"),
        ("train.log_every=0", "log_every=0"),
    ],
)
def test_impossible_lengths_are_refused(override: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        trainer(override)


def test_every_group_option_takes_a_step() -> None:
    for override in (
        *(f"levels={x}" for x in ("flat", "pyramid", "depth", "summary", "pyramid_summary")),
        *(f"regularizer={x}" for x in ("none", "vicreg", "sigreg", "infonce")),
        *(f"teacher={x}" for x in ("ema", "refresh", "none")),
        "projector=mlp",
        *(f"masking={x}" for x in ("multiblock", "block", "random", "hierarchical", "partition")),
        *(f"loss={x}" for x in ("smooth_l1", "mse", "cosine")),
        *(f"schedule={x}" for x in ("cosine", "linear", "constant", "wsd")),
    ):
        t = trainer(override)
        terms = t.train_step(*t.batch(1), 1)
        assert all(value.isfinite() for value in terms.values()), override


def test_bfloat16_on_a_cpu_is_near_float32_and_attends_in_float32() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        t = trainer(f"hardware.precision={precision}")
        losses[precision] = [t.train_step(*t.batch(step), step)["loss"].item() for step in range(3)]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    x = torch.randn(2, 3, 4, 8)
    with t.parts.hardware.autocast():
        assert F.linear(x, torch.randn(8, 8)).dtype == torch.bfloat16
        attended = F.scaled_dot_product_attention(x, x, x)
    assert torch.equal(attended, F.scaled_dot_product_attention(x, x, x))
