"""The plan of a run: every image once an epoch, batch sizes that grow as told, counts that agree with one another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa.config.errors import UserError
from hjepa.optim.step_plan import StepPlan
from tests.helpers.runs import trainer


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    parts = draw(st.integers(1, 3))
    batch = parts * draw(st.integers(1, 8))
    length = draw(st.sampled_from([(draw(st.integers(1, 6)), None), (None, draw(st.integers(1, 60)))]))
    start, warmup = draw(st.sampled_from([(None, 0), (draw(st.integers(parts, batch)), draw(st.integers(1, 4)))]))
    return StepPlan(draw(st.integers(batch, 90)), *length, batch, start, warmup, parts)


@given(plans())
def test_places_sizes_and_counts_agree(plan: StepPlan) -> None:
    epoch = following = seen = 0
    for step in range(plan.steps):
        now, first = plan.locate(step)
        if now != epoch:
            assert (now, first) == (epoch + 1, 0), "epochs follow one another and start with their first image"
            assert plan.images - following < plan.batch_size_at(step - 1), "only what is less than a batch is left out"
            assert plan.epochs_done(step) == now
            epoch, following = now, 0
        assert first == following
        following += plan.batch_size_at(step)
        assert following <= plan.images
        assert plan.batch_size_at(step) % plan.parts == 0
        assert 0 < plan.batch_size_at(step) <= plan.batch_size
        assert plan.images_seen(step) == seen
        seen += plan.batch_size_at(step)
    assert plan.images_seen(plan.steps) == seen
    assert plan.steps == (plan.length or plan.steps_in_first(plan.epochs or 0))
    assert plan.epochs_done(plan.steps) == pytest.approx(plan.epochs or plan.epochs_done(plan.steps))


def test_batches_grow_linearly_and_the_rate_with_them() -> None:
    t = trainer(
        *("train.batch_size=40", "train.batch_start=8", "train.batch_warmup=4", "train.epochs=6"),
        *("schedule=constant", "schedule.lr.warmup_epochs=0"),
    )
    assert [t.plan.batch_size_in_epoch(epoch) for epoch in range(6)] == [8, 16, 24, 32, 40, 40]
    for step in (0, t.plan.epoch_ends[0], t.plan.epoch_ends[3]):
        assert len(t.batch(step)[0]) == t.plan.batch_size_at(step)
        assert t.lr[""][step] == pytest.approx(1.5e-3 * t.plan.batch_size_at(step) / 40)
    assert t.train_step(*t.batch(0), 0)["loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_start": 4}, "train.batch_start=4 and train.batch_warmup=0 go together"),
        ({"batch_start": 50, "batch_warmup": 2}, "train.batch_start=50"),
        ({"parts": 3}, "cannot be cut into 3 equal parts"),
        ({"length": 3}, "set one to at least 1"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        StepPlan(**({"images": 100, "epochs": 2, "length": None, "batch_size": 20} | options))
