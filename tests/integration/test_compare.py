"""Comparisons of runs by the options in which they differ, with and without a sweep."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from hjepa.config.errors import UserError
from hjepa.config.run import run as run_config
from hjepa.sweeps.job import Job
from hjepa.sweeps.plots import probe_curve
from hjepa.sweeps.sweep import Sweep
from hjepa.tracking.run_folder import read_summary
from tests.helpers.runs import compose, tiny

SHORT = ("train.epochs=null", "train.steps=2", "dataset.train=60", "probe.train_images=40")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four runs, with two hierarchies and two seeds, and return their folder."""
    root = tmp_path_factory.mktemp("o")
    for levels in ("flat", "pyramid"):
        for seed in (0, 1):
            names = (f"levels={levels}", f"seed={seed}", f"name={levels}{seed}")
            run_config(compose(f"output_root={root}", *tiny(*SHORT, *names)))
    return root / "default"


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a comparison and returns the contents of compare.json."""

    def compared(*overrides: str) -> dict[str, Any]:
        run_config(compose(f"output_root={tmp_path}", "tracking=none", "name=c", "task=compare", *overrides))
        contents: dict[str, Any] = json.loads((tmp_path / "comparisons" / "c" / "compare.json").read_text())
        return contents

    return compared


def folders(root: Path, *names: str) -> str:
    return f"task.runs=[{','.join(str(root / name) for name in names)}]"


def linear(root: Path, name: str) -> float:
    return read_summary(root / name)["probe"]["linear"]


def test_jobs_without_runs_are_refused_in_one_sentence(compare, tmp_path: Path) -> None:
    Sweep(tmp_path).save([Job(number, [f"run={number}"], None, state="finished") for number in range(2)])
    with pytest.raises(UserError, match="its jobs have no run folders to compare"):
        compare(f"task.sweep={tmp_path}")


def test_a_comparison_has_means_deviations_and_paired_differences(trained: Path, compare, tmp_path, capsys) -> None:
    data = compare(f"task.runs=[{trained}]")
    flat, pyramid = ([linear(trained, f"{levels}{seed}") for seed in (0, 1)] for levels in ("flat", "pyramid"))
    assert [group["probe.linear"]["mean"] for group in data["groups"]] == pytest.approx([mean(flat), mean(pyramid)])
    assert [group["probe.linear"]["deviation"] for group in data["groups"]] == pytest.approx([stdev(flat), stdev(pyramid)])
    differences = [b - a for a, b in zip(flat, pyramid, strict=True)]
    assert data["groups"][1]["difference"]["probe.linear"] == pytest.approx(
        {"mean": mean(differences), "error": stdev(differences) / 2**0.5, "pairs": 2}
    )
    text = capsys.readouterr().out
    assert "levels.pool" in text
    assert "Along with levels.pool differ: levels.stage, levels.weight." in text
    assert "One seed" not in text
    assert (tmp_path / "comparisons" / "c" / "compare.png").stat().st_size > 10000
    assert (tmp_path / "comparisons" / "c" / "progress.png").stat().st_size > 10000


def test_a_probe_curve_starts_at_the_untrained_network_and_ends_at_the_final_result(trained: Path) -> None:
    summary = read_summary(trained / "flat1")
    points = probe_curve(trained / "flat1", "probe/linear")
    assert points[0] == (0, summary["untrained"]["linear"])
    assert points[-1] == (summary["seconds"], summary["probe"]["linear"])
    assert [seconds for seconds, _ in points] == sorted(seconds for seconds, _ in points)


@pytest.mark.thorough
def test_a_sweep_and_its_run_folders_give_the_same_comparison(trained: Path, compare, tmp_path: Path) -> None:
    names = [(levels, str(seed)) for levels in ("flat", "pyramid") for seed in (0, 1)]
    jobs = [Job(n, [f"levels={x}", f"seed={s}"], trained / f"{x}{s}", state="finished") for n, (x, s) in enumerate(names)]
    Sweep(tmp_path).save(jobs)
    by_sweep, by_runs = compare(f"task.sweep={tmp_path}"), compare(f"task.runs=[{trained}]")
    for a, b in zip(by_sweep["groups"], by_runs["groups"], strict=True):
        assert {k: v for k, v in a.items() if k != "options"} == {k: v for k, v in b.items() if k != "options"}
    assert [group["options"] for group in by_sweep["groups"]] == [{"levels": "flat"}, {"levels": "pyramid"}]


def test_a_sweep_that_was_moved_together_with_its_runs_is_found(trained: Path, compare, tmp_path: Path) -> None:
    jobs = [Job(seed, [f"seed={seed}"], tmp_path / "old" / "default" / f"flat{seed}", state="finished") for seed in (0, 1)]
    folder = tmp_path / "new" / "sweeps" / "s"
    folder.mkdir(parents=True)
    Sweep(folder).save(jobs)
    with pytest.raises(UserError, match=r"were moved or removed, for example .*old/default/flat0"):
        compare(f"task.sweep={folder}")
    shutil.copytree(trained / "flat1", tmp_path / "new" / "default" / "flat1")
    with pytest.raises(UserError, match=r"1 of 2 runs are complete, .*flat0 \(missing\)"):
        compare(f"task.sweep={folder}")
    shutil.copytree(trained / "flat0", tmp_path / "new" / "default" / "flat0")
    assert [run["folder"] for run in compare(f"task.sweep={folder}")["runs"]] == [
        str(tmp_path / "new" / "default" / f"flat{seed}") for seed in (0, 1)
    ]


def test_one_pair_of_runs_has_no_error_and_a_warning(trained: Path, compare, capsys) -> None:
    data = compare(folders(trained, "flat0", "pyramid0"))
    assert data["groups"][1]["difference"]["probe.linear"]["error"] is None
    assert "One seed proves nothing" in capsys.readouterr().out


def test_runs_that_differ_only_in_the_seed_are_one_group(trained: Path, compare) -> None:
    (group,) = compare(folders(trained, "flat0", "flat1"))["groups"]
    assert group["options"] == {}
    assert group["probe.linear"]["deviation"] == pytest.approx(stdev([linear(trained, "flat0"), linear(trained, "flat1")]))


def write_evaluation(folder: Path, score: float, about: str = "40 test images", step: int = 2) -> None:
    """Write evaluate/summary.json of a run, with this accuracy of the linear probe."""
    rows = {"pixels": {"part": 0.9}, "trained/block 2": {"part": score, "whole": 0.7}, "trained/block 1": {"part": 0.8}}
    quality = {"trained/block 2": {"std": 0.1, "rankme": 20 * score, "lidar": 3.0}}
    results = {"linear": {"about": about, "rows": rows}, "quality": {"about": "40 test images", "rows": quality}}
    contents = {"checkpoint": "a", "checkpoints": {"a": {"name": "best", "step": step, "results": results}}}
    (folder / "evaluate").mkdir(exist_ok=True)
    (folder / "evaluate" / "summary.json").write_text(json.dumps(contents))


def test_results_of_an_evaluation_are_compared_as_well(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    for name, score in (("flat0", 0.25), ("pyramid0", 0.5)):
        write_evaluation(tmp_path / "runs" / name, score)
    runs = folders(tmp_path / "runs", "flat0", "pyramid0")
    data = compare(runs, "task.metric=evaluate.linear")
    assert [run["evaluate.linear"] for run in data["runs"]] == [0.25, 0.5]
    for metric, key in (("quality", "quality.rankme"), ("quality.lidar", "quality.lidar")):
        data = compare(runs, f"task.metric=evaluate.{metric}")
        assert data["metric"] == f"evaluate.{key}"
        assert [run["evaluate.quality.rankme"] for run in data["runs"]] == [5, 10]
        assert [group[data["metric"]]["mean"] for group in data["groups"]] == ([5, 10] if metric == "quality" else [3, 3])


@pytest.mark.parametrize(
    ("other", "described"),
    [
        ({"about": "40 validation images"}, "40 validation images, at the best checkpoint and the latest checkpoint"),
        ({"step": 1}, "40 test images, at the checkpoint of step 1"),
    ],
)
def test_different_evaluations_are_not_compared(trained: Path, compare, tmp_path: Path, capsys, other, described: str) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    for name, options in (("flat0", {}), ("flat1", {}), ("pyramid0", other)):
        write_evaluation(tmp_path / "runs" / name, 0.5, **options)
    runs = folders(tmp_path / "runs", "flat0", "flat1", "pyramid0")
    data = compare(runs)
    assert "evaluate.linear" not in str(data)
    assert ("evaluate.quality.rankme" in str(data)) == ("about" in other), "the linear probe alone was scored on other images"
    same = "flat0, flat1: 40 test images, at the best checkpoint and the latest checkpoint"
    reason = f"the runs were not evaluated in the same way ({same}; pyramid0: {described}); evaluate them with the same options."
    assert f"evaluate.linear is left out: {reason}" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        compare(runs, "task.metric=evaluate.linear")
    assert str(error.value) == f"task.metric=evaluate.linear: {reason}"


def test_evaluations_at_the_best_steps_of_the_runs_are_compared(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    for name, step in (("flat0", 1), ("pyramid0", 2)):
        folder = tmp_path / "runs" / name
        records = [{"step": 0, "probe/linear": 1.0}, {"step": step, "probe/linear": 0.9}, {"step": 3 - step, "probe/linear": 0.1}]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(record | {"seconds": record["step"]}) + "\n" for record in records)
        )
        write_evaluation(folder, 0.5, step=step)
    data = compare(folders(tmp_path / "runs", "flat0", "pyramid0"))
    assert data["groups"][1]["difference"]["evaluate.linear"]["mean"] == 0


def test_an_unfinished_run_is_listed_but_not_counted(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "runs")
    (tmp_path / "runs" / "pyramid1" / "summary.json").unlink()
    data = compare(f"task.runs=[{tmp_path / 'runs'}]")
    assert [run["state"] for run in data["runs"]] == ["finished"] * 3 + ["unfinished"]
    assert [group["runs"] for group in data["groups"]] == [[0, 1], [2]]
    assert data["groups"][1]["difference"]["probe.linear"]["pairs"] == 1
    for name in ("flat1", "pyramid0"):
        (tmp_path / "runs" / name / "summary.json").unlink()
    with pytest.raises(UserError, match=r"1 of 4 runs are complete.*flat1 \(unfinished\)"):
        compare(f"task.runs=[{tmp_path / 'runs'}]")


def test_runs_that_cannot_be_compared_are_refused_in_one_sentence(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained / "flat0", tmp_path / "again")
    shutil.copytree(trained / "flat0", tmp_path / "old")
    (tmp_path / "old" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "empty").mkdir()
    for overrides, message in (
        (["task.runs=[]"], "needs what to compare"),
        ([folders(trained, "flat0"), f"task.sweep={tmp_path}"], "both are set"),
        ([folders(tmp_path, "empty")], "is no run folder"),
        ([folders(trained, "flat0", "flat0")], "list at least two"),
        ([folders(tmp_path, "again", str(trained / "flat0"))], "do not differ in any option"),
        ([folders(tmp_path, "again", "old")], "of another version of hjepa"),
        ([folders(trained, "flat0", "flat1"), "task.metric=probe.lin"], r"task\.metric=probe\.lin: none of the runs has it"),
        ([f"task.sweep={tmp_path / 'empty'}"], "is no sweep folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            compare(*overrides)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "comparisons").exists(), "nothing was written"


def test_a_benchmark_and_a_trained_run_cannot_be_compared(trained: Path, compare, tmp_path: Path) -> None:
    shutil.copytree(trained / "flat0", tmp_path / "b")
    run_config(compose(f"output_root={tmp_path}", *tiny("task=benchmark", "task.steps=1", "name=x")))
    with pytest.raises(UserError, match=r"benchmark-x is a benchmark and .*flat0 is none"):
        compare(folders(tmp_path, "default/benchmark-x", str(trained / "flat0")))
