"""An evaluation says of a run what the run said of itself, does nothing twice, and refuses in one sentence what it cannot do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hjepa.config.errors import UserError
from hjepa.config.run import run as run_config
from hjepa.tracking.run_folder import read_summary
from tests.helpers.runs import compose, tiny

HERE = ("task=evaluate", "hardware=cpu", "hardware.threads=1", "tracking=none")
QUICK = (
    *("task.finetune.epochs=1", "task.quality.images=10", "task.quality.views=3", "task.test_images=200"),
    *("task.fewshot.shares=[0.1]", "task.fewshot.draws=2", "task.dense.train_images=30", "task.dense.test_images=30"),
)


def evaluate(folder: Path, *options: str) -> float | None:
    return run_config(compose(*HERE, f"run={folder}", *options))


def found(folder: Path) -> dict[str, Any]:
    """Rows by protocol of the checkpoint evaluated last."""
    summary = read_summary(folder / "evaluate")
    return {name: result["rows"] for name, result in summary["checkpoints"][summary["checkpoint"]]["results"].items()}


def colors(root: Path, split: str, each: int, size: int = 32, classes: int = 3) -> None:
    """Noisy images whose class is their color."""
    rng = np.random.default_rng(len(split))
    for label in range(classes):
        place = root / split / f"class{label}"
        place.mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(place / f"{i}.png")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    """Two runs that differ by their seed, with a stacked level."""
    root = tmp_path_factory.mktemp("o")
    for seed in (0, 1):
        own = ("dataset.test=400", "probe.every=1", "levels=stacked", f"seed={seed}", f"name=s{seed}", "checkpoint.last=2")
        run_config(compose(*tiny(f"output_root={root}", *own)))
    return root / "default"


@pytest.fixture(scope="module")
def colored(tmp_path_factory) -> Path:
    """A run on a folder of images."""
    root = tmp_path_factory.mktemp("c")
    colors(root / "images", "train", 20)
    colors(root / "images", "test", 5)
    own = ("dataset=image_folder", f"dataset.root={root}/images", "dataset.validation=0.2", "train.batch_size=16", "name=r")
    run_config(compose(*tiny(f"output_root={root}", *own)))
    return root


@pytest.fixture
def fresh(seeds: Path, tmp_path: Path) -> Path:
    """A copy of a run, in another place."""
    return Path(shutil.copytree(seeds / "s0", tmp_path / "moved"))


@pytest.fixture
def fresh_colored(colored: Path, tmp_path: Path) -> Path:
    """A copy of a run and of its images; the run finds those by task.root."""
    shutil.copytree(colored / "images", tmp_path / "images")
    return Path(shutil.copytree(colored / "default" / "r", tmp_path / "r"))


def test_on_the_validation_part_the_scores_are_those_of_the_run_itself(fresh: Path) -> None:
    options = (
        "task.protocols=[linear,knn,quality]",
        "task.split=validation",
        "task.train_images=100",
        "task.checkpoint=latest",
        "task.quality.images=5",
    )
    evaluate(fresh, *options)
    rows, own = found(fresh), read_summary(fresh)
    for source, scores in (("trained/block 2", own["probe"]), ("untrained/block 2", own["untrained"])):
        assert rows["linear"][source] == {"part": scores["linear"], "whole": scores["linear_whole"]}
        assert rows["knn"][source] == {"part": scores["knn"], "whole": scores["knn_whole"]}
        assert rows["quality"][source]["rankme"] == scores["rankme"]


def test_all_protocols_judge_all_sources_and_are_not_done_again(fresh: Path, capsys) -> None:
    score = evaluate(fresh, "task.protocols=all", *QUICK)
    rows = found(fresh)
    assert set(rows) == {"linear", "knn", "fewshot", "finetune", "dense", "quality"}
    assert "transfer is left out: " in capsys.readouterr().out
    rests = {f"{who}/{what}" for who in ("trained", "untrained") for what in ("block 1", "block 2", "stacked 1")}
    assert set(rows["linear"]) == set(rows["knn"]) == rests | {"pixels"}
    assert set(rows["quality"]) == rests
    assert set(rows["dense"]) == {r for r in rests if "block" in r} | {"pixels"}
    assert score == rows["linear"]["trained/block 2"]["part"]
    assert all(rows["quality"][f"trained/{layer}"] != rows["quality"][f"untrained/{layer}"] for layer in ("block 2", "stacked 1"))
    assert all(np.isfinite(v) for sources in rows.values() for columns in sources.values() for v in columns.values())

    before = (fresh / "evaluate" / "summary.json").read_text()
    text = (fresh / "evaluate" / "table.txt").read_text()
    shutil.rmtree(fresh / "evaluate" / "features")
    assert evaluate(fresh, "task.protocols=all", *QUICK) == score
    assert (fresh / "evaluate" / "summary.json").read_text() == before
    assert (fresh / "evaluate" / "table.txt").read_text() == text
    assert not (fresh / "evaluate" / "features").exists()


def test_other_options_and_checkpoints_are_judged_anew_beside_what_is_known(fresh: Path) -> None:
    evaluate(fresh, "task.protocols=[knn,linear]", "task.checkpoint=epoch-00001")
    first = read_summary(fresh / "evaluate")
    places = set((fresh / "evaluate" / "features").iterdir())
    evaluate(fresh, "task.protocols=knn", "task.checkpoint=epoch-00001", "task.knn.neighbors=1")
    second = read_summary(fresh / "evaluate")
    old, new = (s["checkpoints"][s["checkpoint"]]["results"] for s in (first, second))
    assert old["linear"] == new["linear"]
    assert old["knn"] != new["knn"]
    assert set((fresh / "evaluate" / "features").iterdir()) == places  # the same features served both
    evaluate(fresh, "task.protocols=knn", "task.checkpoint=epoch-00002")
    third = read_summary(fresh / "evaluate")
    assert third["checkpoint"] != first["checkpoint"]
    assert third["checkpoints"][first["checkpoint"]] == second["checkpoints"][first["checkpoint"]]
    assert not places & set((fresh / "evaluate" / "features").iterdir())


def test_an_interrupted_evaluation_goes_on(fresh: Path, monkeypatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hjepa.tasks.evaluate.linear_knn.knn", interrupt)
        with pytest.raises(UserError, match="Interrupted"):
            evaluate(fresh, "task.protocols=[linear,knn]")
    assert read_summary(fresh / "evaluate")["status"] == "unfinished"
    kept = found(fresh)
    assert set(kept) == {"linear"}
    with monkeypatch.context() as patch:
        patch.setattr("hjepa.metrics.probes.logistic", interrupt)
        evaluate(fresh, "task.protocols=[linear,knn]")
    assert read_summary(fresh / "evaluate")["status"] == "finished"
    assert found(fresh)["linear"] == kept["linear"]


def test_seeds_are_shown_with_mean_and_standard_deviation(seeds: Path, tmp_path: Path) -> None:
    shutil.copytree(seeds, tmp_path / "runs")
    shutil.copytree(seeds / "s0", tmp_path / "runs" / "hopeless")
    shutil.rmtree(tmp_path / "runs" / "hopeless" / "checkpoints")
    score = evaluate(tmp_path / "runs", "task.protocols=[linear]")
    (group,) = read_summary(tmp_path / "runs" / "evaluate")["groups"]
    each = [found(tmp_path / "runs" / name)["linear"] for name in ("s0", "s1")]
    for source, columns in group["means"]["linear"].items():
        values = [rows[source]["whole"] for rows in each]
        assert columns["whole"] == mean(values)
        assert columns["whole std"] == pytest.approx(stdev(values))
    assert score == mean(rows["trained/block 2"]["part"] for rows in each)
    text = (tmp_path / "runs" / "evaluate" / "table.txt").read_text()
    assert "seed 0" in text
    assert "seed 1" in text


def test_linear_and_knn_agree_with_scikit_learn_on_the_same_features(fresh: Path) -> None:
    from hjepa.config.schema import resolve
    from hjepa.data.shapes import Shapes
    from hjepa.tasks.evaluate.features import Data, Features
    from hjepa.tasks.trained_run import load_run

    evaluate(fresh, "task.protocols=[linear,knn]", "task.linear.penalties=[0.01]")
    run = load_run(resolve(compose(*HERE[1:], f"run={fresh}")), None, None)
    assert isinstance(run.dataset, Shapes)
    data = Data(run.dataset, run.config["dataset"], "test", None, None)
    labels, truth = (data.parts[role].labels["part"].numpy() for role in ("train", "test"))
    rows, seen = found(fresh), 0
    for source, x, y in Features(run, data, fresh / "evaluate" / "features", [1, 2], 128).pairs():
        linear = LogisticRegression(C=1 / (0.01 * len(x)), max_iter=2000).fit(x.numpy(), labels)
        assert rows["linear"][source]["part"] == pytest.approx(linear.score(y.numpy(), truth), abs=0.003)
        vote = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp(-d / 0.07)).fit(x.numpy(), labels)
        assert rows["knn"][source]["part"] == pytest.approx(vote.score(y.numpy(), truth), abs=0.003)
        seen += 1
    assert seen == len(rows["linear"])


def test_transfer_judges_the_same_features_on_other_images(fresh: Path, colored: Path, tmp_path: Path) -> None:
    colors(tmp_path / "small", "train", 12, size=24)
    colors(tmp_path / "small", "test", 4, size=24)
    other = ("dataset@task.transfer=image_folder", f"task.transfer.root={tmp_path}/small")
    evaluate(fresh, "task.protocols=[transfer]", *other)
    rows = found(fresh)["transfer"]
    assert rows["trained/block 2"] == {"class/linear": 1.0, "class/knn": 1.0}
    assert rows["pixels"]["class/linear"] == 1.0


def test_fine_tuning_learns_and_leaves_the_run_as_it_is(fresh_colored: Path) -> None:
    before = (fresh_colored / "checkpoints" / "latest.pt").read_bytes()
    evaluate(fresh_colored, "task.protocols=[finetune]", "task.finetune.epochs=8", "task.finetune.batch_size=16")
    rows = found(fresh_colored)["finetune"]
    assert rows["trained/block 2"]["class"] == 1.0
    assert (fresh_colored / "checkpoints" / "latest.pt").read_bytes() == before


def remove_class(folder: Path) -> None:
    shutil.rmtree(folder.parent / "images" / "test" / "class1")


def remove_test(folder: Path) -> None:
    shutil.rmtree(folder.parent / "images" / "test")


def remove_labels(folder: Path) -> None:
    for split in ("train", "test"):
        place = folder.parent / "images" / split
        for file in sorted(place.glob("*/*.png")):
            file.rename(place / f"{file.parent.name}-{file.name}")
        for empty in place.glob("class*/"):
            empty.rmdir()


def nothing(folder: Path) -> None:
    """The run is as it should be."""


@pytest.mark.parametrize(
    ("break_it", "options", "word"),
    [
        (nothing, ("task.protocols=[lineer]",), r"lineer.*expected some of linear, knn"),
        (nothing, ("task.protocols=[dense]",), "dense is for runs on dataset=shapes"),
        (nothing, ("task.protocols=[transfer]",), r"dataset@task.transfer=cifar100"),
        (
            nothing,
            ("task.protocols=[transfer]", "dataset@task.transfer=image_folder", "task.transfer.root=nowhere"),
            r"In task\.transfer, dataset\.root.*nowhere",
        ),
        (nothing, ("task.depths=[3]",), "encoder of 2 blocks"),
        (nothing, ("task.train_images=0",), "task.train_images=0"),
        (nothing, ("task.protocols=[fewshot]", "task.fewshot.shots=[17]"), "only 16 images to draw from"),
        (nothing, ("task.protocols=[finetune]", "task.finetune.batch_size=49"), "at most 48"),
        (nothing, ("task.checkpoint=epoch-00009",), "choose task.checkpoint among"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), (), "stopped before its first one"),
        (lambda folder: (folder / "config.yaml").write_text("seed: 0\n"), (), "another version of hjepa"),
        (remove_class, (), "class1 in its train split only"),
        (remove_test, (), "task.split=validation"),
        (remove_labels, (), "have no labels"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_sentence(fresh_colored: Path, break_it: Callable, options, word: str) -> None:
    break_it(fresh_colored)
    with pytest.raises(UserError, match=word) as error:
        evaluate(fresh_colored, f"task.root={fresh_colored.parent}/images", *options)
    assert "\n" not in str(error.value)
    assert not list(fresh_colored.glob("evaluate/features/*"))


def test_without_a_run_there_is_nothing_to_judge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a run folder"):
        run_config(compose(*HERE))
    with pytest.raises(UserError, match="holds none"):
        evaluate(tmp_path)


def test_the_tracker_has_every_score_once(run, tmp_path: Path) -> None:
    import mlflow

    run("name=t", "tracking=[mlflow]", "tracking.mlflow.system_metrics=false", "train.epochs=1")
    folder = tmp_path / "default" / "t"
    for _ in range(2):
        options = ("tracking=[mlflow]", f"output_root={tmp_path}", "task.protocols=[knn]", "task.depths=[2]")
        run_config(compose(*HERE[:3], f"run={folder}", *options))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = read_summary(folder)["run_id"]
    for source, columns in found(folder)["knn"].items():
        for column, value in columns.items():
            (point,) = client.get_metric_history(run_id, f"evaluate/knn/{source}/{column}")
            assert (point.value, point.step) == (value, 9)
    assert {file.path for file in client.list_artifacts(run_id, "evaluate")} == {"evaluate/summary.json", "evaluate/table.txt"}
    assert json.loads((folder / "evaluate" / "summary.json").read_text())["run_id"] == run_id
