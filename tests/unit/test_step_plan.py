"""The plan of a run: every image once per epoch, batch sizes that grow as configured, and consistent counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa.config.errors import UserError
from hjepa.optim.step_plan import StepPlan
from tests.helpers.runs import trainer


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    divisor = draw(st.integers(1, 3))
    batch = divisor * draw(st.integers(1, 8))
    length = draw(st.sampled_from([(draw(st.integers(1, 6)), None), (None, draw(st.integers(1, 60)))]))
    start, warmup = draw(st.sampled_from([(None, 0), (draw(st.integers(divisor, batch)), draw(st.integers(1, 4)))]))
    return StepPlan(draw(st.integers(batch, 90)), *length, batch, start, warmup, divisor)


@given(plans())
def test_positions_batch_sizes_and_counts_agree(plan: StepPlan) -> None:
    epoch = next_image = seen = 0
    for step in range(plan.num_steps):
        epoch_of_step, first = plan.locate(step)
        if epoch_of_step != epoch:
            assert (epoch_of_step, first) == (epoch + 1, 0), "epochs follow one another and start with their first image"
            assert plan.num_images - next_image < plan.batch_size_at(step - 1), "only an incomplete batch is left out"
            assert plan.epochs_done(step) == epoch_of_step
            epoch, next_image = epoch_of_step, 0
        assert first == next_image
        next_image += plan.batch_size_at(step)
        assert next_image <= plan.num_images
        assert plan.batch_size_at(step) % plan.divisor == 0
        assert 0 < plan.batch_size_at(step) <= plan.batch_size
        assert plan.images_seen(step) == seen
        seen += plan.batch_size_at(step)
    assert plan.images_seen(plan.num_steps) == seen
    assert plan.num_steps == (plan.length or plan.steps_in_first(plan.epochs or 0))
    assert plan.epochs_done(plan.num_steps) == pytest.approx(plan.epochs or plan.epochs_done(plan.num_steps))


def test_the_batch_size_grows_linearly_and_the_learning_rate_in_proportion() -> None:
    t = trainer(
        *("train.batch_size=40", "train.batch_start=8", "train.batch_warmup=4", "train.epochs=6"),
        *("schedule=constant", "schedule.lr.warmup_epochs=0"),
    )
    assert [t.plan.batch_size_in_epoch(epoch) for epoch in range(6)] == [8, 16, 24, 32, 40, 40]
    for step in (0, t.plan.epoch_ends[0], t.plan.epoch_ends[3]):
        assert len(t.get_batch(step)[0]) == t.plan.batch_size_at(step)
        assert t.learning_rates[""][step] == pytest.approx(2e-3 * t.plan.batch_size_at(step) / 40)
    assert t.train_step(t.get_batch(0), 0)["loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_start": 4}, "train.batch_start=4 and train.batch_warmup=0 belong together"),
        ({"batch_start": 50, "batch_warmup": 2}, "train.batch_start=50"),
        ({"divisor": 3}, "cannot be divided into 3 equal parts"),
        ({"length": 3}, "set exactly one"),
        ({"batch_size": 101}, "train.batch_size=101: expected at most 100"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StepPlan(**({"num_images": 100, "epochs": 2, "length": None, "batch_size": 20} | options))
