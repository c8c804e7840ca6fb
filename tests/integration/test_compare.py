"""Runs are compared by what differs in their configs, seed by seed, whether or not a sweep made them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hjepa.config.errors import UserError
from hjepa.config.run import run as run_config
from hjepa.sweeps.job import Job
from hjepa.sweeps.plots import course
from hjepa.sweeps.plots import line_label as label
from hjepa.sweeps.sweep import Sweep
from hjepa.sweeps.tables import difference
from hjepa.tasks.compare import differing
from hjepa.tracking.run_folder import read_summary
from tests.helpers.runs import compose, tiny

SHORT = ("train.epochs=null", "train.steps=2", "dataset.train=60", "probe.train_images=40")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of four runs, of two kinds and two seeds each."""
    root = tmp_path_factory.mktemp("o")
    for levels in ("flat", "pyramid"):
        for seed in (0, 1):
            names = (f"levels={levels}", f"seed={seed}", f"name={levels}{seed}")
            run_config(compose(f"output_root={root}", *tiny(*SHORT, *names)))
    return root / "default"


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Compare and return compare.json."""

    def compared(*overrides: str) -> dict[str, Any]:
        run_config(compose(f"output_root={tmp_path}", "tracking=none", "name=c", "task=compare", *overrides))
        contents: dict[str, Any] = json.loads((tmp_path / "comparisons" / "c" / "compare.json").read_text())
        return contents

    return compared


def folders(root: Path, *names: str) -> str:
    return f"task.runs=[{','.join(str(root / name) for name in names)}]"


def linear(root: Path, name: str) -> float:
    return read_summary(root / name)["probe"]["linear"]


def test_a_comparison_holds_the_mean_the_spread_and_the_differences_seed_by_seed(
    trained: Path, compare, tmp_path, capsys
) -> None:
    found = compare(f"task.runs=[{trained}]")
    flat, pyramid = ([linear(trained, f"{levels}{seed}") for seed in (0, 1)] for levels in ("flat", "pyramid"))
    assert [group["probe.linear"]["mean"] for group in found["groups"]] == [mean(flat), mean(pyramid)]
    assert [group["probe.linear"]["deviation"] for group in found["groups"]] == [stdev(flat), stdev(pyramid)]
    differences = [b - a for a, b in zip(flat, pyramid, strict=True)]
    assert found["groups"][1]["difference"]["probe.linear"] == pytest.approx(
        {"mean": mean(differences), "error": stdev(differences) / 2**0.5, "pairs": 2}
    )
    text = capsys.readouterr().out
    assert "levels.pool" in text
    assert "Along with levels.pool differ: levels.depth, levels.weight." in text
    assert "One seed" not in text
    assert (tmp_path / "comparisons" / "c" / "compare.png").stat().st_size > 10000
    assert (tmp_path / "comparisons" / "c" / "progress.png").stat().st_size > 10000


@given(st.integers(1, 40), st.integers(1, 3))
def test_what_a_line_is_called_fits_the_picture_however_much_varies(varied: int, seeds: int) -> None:
    axes, chosen = [f"model.encoder.option{i}" for i in range(varied)], ("value",) * varied
    runs = [Job(number, [], Path("runs") / f"{'a-long-name-' * 4}{number}") for number in range(seeds)]
    assert 0 < len(label(axes, chosen, runs)) <= 110


def test_a_probe_goes_from_the_untrained_network_to_the_end_over_the_seconds_of_training(trained: Path) -> None:
    summary = read_summary(trained / "flat1")
    points = course(trained / "flat1", "probe/linear")
    assert points[0] == (0, summary["untrained"]["linear"])
    assert points[-1] == (summary["seconds"], summary["probe"]["linear"])
    assert [seconds for seconds, _ in points] == sorted(seconds for seconds, _ in points)


def test_a_sweep_and_its_runs_compare_alike(trained: Path, compare, tmp_path: Path) -> None:
    names = [(levels, str(seed)) for levels in ("flat", "pyramid") for seed in (0, 1)]
    jobs = [Job(n, [f"levels={x}", f"seed={s}"], trained / f"{x}{s}", state="finished") for n, (x, s) in enumerate(names)]
    Sweep(tmp_path).write(jobs)
    by_sweep, by_runs = compare(f"task.sweep={tmp_path}"), compare(f"task.runs=[{trained}]")
    for a, b in zip(by_sweep["groups"], by_runs["groups"], strict=True):
        assert {k: v for k, v in a.items() if k != "options"} == {k: v for k, v in b.items() if k != "options"}
    assert [group["options"] for group in by_sweep["groups"]] == [{"levels": "flat"}, {"levels": "pyramid"}]


def test_one_seed_proves_nothing(trained: Path, compare, capsys) -> None:
    found = compare(folders(trained, "flat0", "pyramid0"))
    assert found["groups"][1]["difference"]["probe.linear"]["error"] is None
    assert "One seed proves nothing" in capsys.readouterr().out


def test_seeds_alone_are_one_group_with_a_spread(trained: Path, compare) -> None:
    (group,) = compare(folders(trained, "flat0", "flat1"))["groups"]
    assert group["options"] == {}
    assert group["probe.linear"]["deviation"] == stdev([linear(trained, "flat0"), linear(trained, "flat1")])


def test_results_of_an_evaluation_are_beside_those_of_the_run(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    for name, score in (("flat0", 0.25), ("pyramid0", 0.5)):
        (tmp_path / "runs" / name / "evaluate").mkdir()
        rows = {"pixels": {"part": 0.9}, "trained/depth1": {"part": 0.8}, "trained/depth2": {"part": score, "whole": 0.7}}
        contents = {"checkpoint": "a", "checkpoints": {"a": {"results": {"linear": {"rows": rows}}}}}
        (tmp_path / "runs" / name / "evaluate" / "summary.json").write_text(json.dumps(contents))
    found = compare(folders(tmp_path / "runs", "flat0", "pyramid0"), "task.metric=evaluate.linear")
    assert [run["evaluate.linear"] for run in found["runs"]] == [0.25, 0.5]


def test_a_run_that_is_not_at_its_end_is_shown_but_not_counted(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    (tmp_path / "runs" / "pyramid1" / "summary.json").unlink()
    found = compare(f"task.runs=[{tmp_path / 'runs'}]")
    assert [run["state"] for run in found["runs"]] == ["finished"] * 3 + ["unfinished"]
    assert [group["runs"] for group in found["groups"]] == [[0, 1], [2]]
    assert found["groups"][1]["difference"]["probe.linear"]["pairs"] == 1
    for name in ("flat1", "pyramid0"):
        (tmp_path / "runs" / name / "summary.json").unlink()
    with pytest.raises(UserError, match=r"1 of 4 runs have come to their ends.*flat1 \(unfinished\)"):
        compare(f"task.runs=[{tmp_path / 'runs'}]")


def test_what_cannot_be_compared_is_refused_in_one_sentence(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained / "flat0", tmp_path / "again")
    shutil.copytree(trained / "flat0", tmp_path / "old")
    (tmp_path / "old" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "empty").mkdir()
    for options, sentence in (
        (["task.runs=[]"], "needs what to compare"),
        ([folders(trained, "flat0"), f"task.sweep={tmp_path}"], "needs what to compare"),
        ([folders(tmp_path, "empty")], "is no run folder"),
        ([folders(trained, "flat0", "flat0")], "give at least two"),
        ([folders(tmp_path, "again", str(trained / "flat0"))], "differ in nothing"),
        ([folders(tmp_path, "again", "old")], "of another version of hjepa"),
        ([folders(trained, "flat0", "flat1"), "task.metric=probe.lin"], r"task\.metric=probe\.lin: none of the runs has it"),
        ([f"task.sweep={tmp_path / 'empty'}"], "is no sweep folder"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            compare(*options)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "comparisons").exists(), "nothing was begun"


def test_a_benchmark_and_a_trained_run_are_not_compared(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained / "flat0", tmp_path / "b")
    run_config(compose(f"output_root={tmp_path}", *tiny("task=benchmark", "task.steps=1", "name=x")))
    with pytest.raises(UserError, match=r"benchmark-x is a benchmark and .*flat0 is none"):
        compare(folders(tmp_path, "default/benchmark-x", str(trained / "flat0")))


def jobs(scores: dict[int, float]) -> list[Job]:
    return [Job(0, [], None, summary={"seed": seed, "x": score}) for seed, score in scores.items()]


numbers = st.dictionaries(st.integers(0, 9), st.floats(-1, 1), min_size=2)


@given(numbers, st.floats(-1, 1))
def test_a_gain_that_is_the_same_for_every_seed_has_no_error(scores: dict[int, float], gain: float) -> None:
    found = difference(jobs(scores), jobs({seed: score + gain for seed, score in scores.items()}), "x")
    assert found is not None
    assert found == pytest.approx((gain, 0, len(scores)), abs=1e-9)


@given(numbers, numbers)
def test_only_seeds_that_both_have_count_and_the_order_turns_the_sign(a: dict[int, float], b: dict[int, float]) -> None:
    there, back = difference(jobs(a), jobs(b), "x"), difference(jobs(b), jobs(a), "x")
    if not a.keys() & b.keys():
        assert there is None
        return
    assert there is not None
    assert back is not None
    assert there.pairs == len(a.keys() & b.keys())
    assert there.mean == pytest.approx(-back.mean)


keys = st.sampled_from(["seed", "loss._target_", "loss.beta", "levels.pool", "levels.depth", "optimizer.lr"])
configs = st.lists(st.dictionaries(keys, st.integers(0, 2) | st.none()), min_size=2, max_size=5)


@given(configs)
def test_two_runs_look_alike_only_if_they_are(found: list[dict[str, Any]]) -> None:
    if all(config == found[0] for config in found):
        with pytest.raises(UserError, match="differ in nothing"):
            differing(found)
        return
    named, _ = differing(found)
    for i, own in enumerate(named):
        for j, other in enumerate(named):
            assert (own == other) == (found[i] == found[j])
