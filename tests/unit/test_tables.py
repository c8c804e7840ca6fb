"""Tables of sweeps and comparisons."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa.config.errors import UserError
from hjepa.sweeps.job import Job
from hjepa.sweeps.plots import line_label
from hjepa.sweeps.tables import Comparison, varied
from hjepa.tasks.compare import differing_options

Scores = dict[int, float]  # by seed

scores = st.dictionaries(st.integers(0, 9), st.floats(-1, 1), min_size=2)


def compare(**groups: Scores) -> Comparison:
    """Return a comparison of the metric `x` in groups of finished runs that differ in the option `loss`."""
    pairs = [(loss, seed, score) for loss, results in groups.items() for seed, score in results.items()]
    jobs = [
        Job(number, [f"loss={loss}", f"seed={seed}", "shared=1"], Path(f"/runs/{number}"), state="finished", summary={"x": score})
        for number, (loss, seed, score) in enumerate(pairs)
    ]
    return Comparison(jobs, "x")


def difference(a: Scores, b: Scores) -> dict[str, float]:
    """Return the mean, standard error and number of pairs of the difference b - a."""
    return compare(a=a, b=b).differences()["x"].iloc[0].to_dict()


def test_seeds_form_groups_and_are_never_an_option() -> None:
    comparison = compare(a={0: 0.2, 1: 0.4}, b={0: 0.6, 1: 0.6})
    assert varied(comparison.jobs) == ["loss", "seed"]
    assert comparison.options == ["loss"]
    assert comparison.values("x") == {("a",): [0.2, 0.4], ("b",): [0.6, 0.6]}
    text = comparison.to_text("Sweep", Path("/"))
    assert "0.3 +- 0.141" in text, "mean and sample standard deviation of a"
    assert "+0.3 +- 0.1" in text, "difference and its standard error"
    assert "shared" not in text


def test_groups_keep_the_order_of_the_jobs() -> None:
    comparison = compare(b={0: 1.0, 1: 2.0}, a={1: 3.0, 0: 5.0})
    assert list(comparison.means().index) == ["b", "a"]
    assert comparison.differences()["x"].iloc[0].to_dict() == pytest.approx({"mean": 2.5, "sem": 1.5, "count": 2})


@given(scores, st.floats(-1, 1))
def test_a_gain_that_is_the_same_for_every_seed_has_no_error(results: Scores, gain: float) -> None:
    found = difference(results, {seed: score + gain for seed, score in results.items()})
    assert found == pytest.approx({"mean": gain, "sem": 0, "count": len(results)}, abs=1e-9)


@given(scores, scores)
def test_only_common_seeds_count_and_the_order_reverses_the_sign(a: Scores, b: Scores) -> None:
    forward, backward = difference(a, b), difference(b, a)
    assert forward["count"] == backward["count"] == len(a.keys() & b.keys())
    if forward["count"]:
        assert forward["mean"] == pytest.approx(-backward["mean"])


@given(st.integers(1, 40), st.integers(1, 3))
def test_the_label_of_a_line_fits_the_plot_for_any_number_of_options(num_options: int, num_seeds: int) -> None:
    options, group = [f"model.encoder.option{i}" for i in range(num_options)], ("value",) * num_options
    jobs = [Job(number, [], Path("runs") / f"{'a-long-name-' * 4}{number}") for number in range(num_seeds)]
    assert 0 < len(line_label(options, group, jobs)) <= 110


keys = st.sampled_from(["seed", "loss._target_", "loss.beta", "levels.pool", "levels.stage", "optimizer.lr"])
configs = st.lists(st.dictionaries(keys, st.integers(0, 2) | st.none()), min_size=2, max_size=5)


@given(configs)
def test_two_runs_have_the_same_overrides_only_if_their_configs_are_equal(configs: list[dict[str, Any]]) -> None:
    if all(config == configs[0] for config in configs):
        with pytest.raises(UserError, match="do not differ in any option"):
            differing_options(configs)
        return
    overrides, _ = differing_options(configs)
    for i, own in enumerate(overrides):
        for j, other in enumerate(overrides):
            assert (own == other) == (configs[i] == configs[j])
