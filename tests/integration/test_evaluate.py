"""Evaluation of finished runs: its scores equal those of the run, are not computed twice, and bad requests are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from hydra.errors import MissingConfigException
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hjepa.config.cli_errors import format_hydra_error
from hjepa.config.errors import UserError
from hjepa.config.run import run as run_config
from hjepa.data.sources import FilePaths
from hjepa.tracking.run_folder import read_summary
from tests.helpers.database import prepare_database
from tests.helpers.runs import compose, tiny

EVALUATE = ("task=evaluate", "hardware=cpu", "hardware.threads=1", "tracking=none")
QUICK = (
    *("task.test_images=200", "protocol.finetune.epochs=1", "protocol.quality.images=10", "protocol.quality.views=3"),
    *("protocol.fewshot.shares=[0.1]", "protocol.fewshot.draws=2"),
    *("protocol.dense.train_images=30", "protocol.dense.test_images=30"),
)


def evaluate(folder: Path, *options: str) -> float | None:
    return run_config(compose(*EVALUATE, f"run={folder}", *options))


def read_scores(folder: Path) -> dict[str, Any]:
    """Return the scores by protocol of the checkpoint that was evaluated last."""
    summary = read_summary(folder / "evaluate")
    return {name: result["rows"] for name, result in summary["checkpoints"][summary["checkpoint"]]["results"].items()}


def write_color_images(root: Path, split: str, per_class: int, size: int = 32, classes: int = 3) -> None:
    """Write noisy images whose class is their color."""
    rng = np.random.default_rng(len(split))
    for label in range(classes):
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    """Train two runs with a stacked level that differ only in their seeds."""
    root = tmp_path_factory.mktemp("o")
    for seed in (0, 1):
        options = ("dataset.test=400", "probe.every=1", "levels=stacked", f"seed={seed}", f"name=s{seed}", "checkpoint.last=2")
        run_config(compose(*tiny(f"output_root={root}", *options)))
    return root / "default"


@pytest.fixture(scope="module")
def colored(tmp_path_factory) -> Path:
    """Train a run on a folder of images."""
    root = tmp_path_factory.mktemp("c")
    write_color_images(root / "images", "train", 20)
    write_color_images(root / "images", "test", 5)
    options = ("dataset=image_folder", f"dataset.root={root}/images", "dataset.validation=0.2", "train.batch_size=16", "name=r")
    run_config(compose(*tiny(f"output_root={root}", *options)))
    return root


@pytest.fixture
def fresh(seeds: Path, tmp_path: Path) -> Path:
    """Copy a run to another folder."""
    return Path(shutil.copytree(seeds / "s0", tmp_path / "moved"))


@pytest.fixture
def fresh_colored(colored: Path, tmp_path: Path) -> Path:
    """Copy a run and its images, which task.root then locates."""
    shutil.copytree(colored / "images", tmp_path / "images")
    return Path(shutil.copytree(colored / "default" / "r", tmp_path / "r"))


def test_scores_on_the_validation_part_equal_the_probe_scores_of_the_run(fresh: Path) -> None:
    options = (
        "protocol=[linear,knn,quality]",
        "task.split=validation",
        "task.train_images=100",
        "task.checkpoint=latest",
        "protocol.quality.images=5",
    )
    evaluate(fresh, *options)
    scores, summary = read_scores(fresh), read_summary(fresh)
    for source, probe in (("trained/block 2", summary["probe"]), ("untrained/block 2", summary["untrained"])):
        assert scores["linear"][source] == {"part": probe["linear"], "whole": probe["linear_whole"]}
        assert scores["knn"][source] == {"part": probe["knn"], "whole": probe["knn_whole"]}
        assert scores["quality"][source]["rankme"] == probe["rankme"]


def test_every_protocol_scores_every_source_and_is_not_computed_again(fresh: Path, capsys) -> None:
    score = evaluate(fresh, "protocol=all", *QUICK)
    rows = read_scores(fresh)
    assert set(rows) == {"linear", "knn", "fewshot", "finetune", "dense", "quality"}
    assert "transfer is left out: " in capsys.readouterr().out
    layers = {f"{kind}/{layer}" for kind in ("trained", "untrained") for layer in ("block 1", "block 2", "stacked 1")}
    assert set(rows["linear"]) == set(rows["knn"]) == layers | {"pixels"}
    assert set(rows["quality"]) == layers
    assert set(rows["dense"]) == {layer for layer in layers if "block" in layer} | {"pixels"}
    assert score == rows["linear"]["trained/block 2"]["part"]
    assert all(rows["quality"][f"trained/{layer}"] != rows["quality"][f"untrained/{layer}"] for layer in ("block 2", "stacked 1"))
    assert all(np.isfinite(v) for sources in rows.values() for columns in sources.values() for v in columns.values())

    before = (fresh / "evaluate" / "summary.json").read_text()
    text = (fresh / "evaluate" / "table.txt").read_text()
    shutil.rmtree(fresh / "evaluate" / "features")
    (fresh / "evaluate" / "features").mkdir()
    (fresh / "evaluate" / "features" / ".DS_Store").touch()
    assert evaluate(fresh, "protocol=all", *QUICK) == score
    assert (fresh / "evaluate" / "summary.json").read_text() == before
    assert (fresh / "evaluate" / "table.txt").read_text() == text
    assert not list((fresh / "evaluate" / "features").iterdir())


def test_other_options_and_checkpoints_are_evaluated_beside_the_earlier_results(fresh: Path) -> None:
    evaluate(fresh, "protocol=[knn,linear]", "task.checkpoint=epoch-00001")
    first = read_summary(fresh / "evaluate")
    features = set((fresh / "evaluate" / "features").iterdir())
    evaluate(fresh, "protocol=knn", "task.checkpoint=epoch-00001", "protocol.knn.neighbors=1")
    second = read_summary(fresh / "evaluate")
    old, new = (s["checkpoints"][s["checkpoint"]]["results"] for s in (first, second))
    assert old["linear"] == new["linear"]
    assert old["knn"] != new["knn"]
    assert set((fresh / "evaluate" / "features").iterdir()) == features  # both used the same features
    evaluate(fresh, "protocol=knn", "task.checkpoint=epoch-00002")
    third = read_summary(fresh / "evaluate")
    assert third["checkpoint"] != first["checkpoint"]
    assert third["checkpoints"][first["checkpoint"]] == second["checkpoints"][first["checkpoint"]]
    assert not features & set((fresh / "evaluate" / "features").iterdir())


def test_an_evaluation_is_repeated_if_images_were_added_or_moved_to_another_class(fresh_colored: Path) -> None:
    images = fresh_colored.parent / "images"
    options = ("protocol=[linear,knn]", f"task.root={images}")

    def scores_after(change: Callable[[], object]) -> dict[str, Any]:
        change()
        evaluate(fresh_colored, *options)
        return read_scores(fresh_colored)

    first = scores_after(lambda: None)
    for i in range(10):
        (images / "train" / "class0" / f"{i}.png").rename(images / "train" / "class2" / f"moved{i}.png")
    moved = scores_after(lambda: None)
    assert moved["linear"] != first["linear"]
    write_color_images(images / "more", "train", 3)
    added = scores_after(
        lambda: [file.rename(images / "train" / file.parent.name / f"a{file.name}") for file in images.glob("more/*/*/*")]
    )
    evaluate(fresh_colored, *options, "overwrite=true")
    assert read_scores(fresh_colored) == added


def test_streamed_images_are_decoded_once_per_source(fresh_colored: Path, monkeypatch) -> None:
    config = fresh_colored / "config.yaml"
    streamed = re.sub(r"memory_limit_gb: .*", "memory_limit_gb: 0", config.read_text())
    config.write_text(re.sub(r"workers: .*", "workers: 0", streamed))
    opened: list[int] = []
    monkeypatch.setattr(FilePaths, "open", lambda self, position: opened.append(position) or self.name(position))
    evaluate(fresh_colored, "protocol=[linear,knn]", f"task.root={fresh_colored.parent / 'images'}")
    in_total = 3 * 20 * 4 // 5 + 3 * 5  # training images that are not held out, and test images
    in_advance = len(opened) - 3 * in_total  # looked at by the checks
    assert 0 <= in_advance <= 4, "the trained network, the untrained one, and the pixels"


def test_overwrite_replaces_the_chosen_protocols_only(fresh_colored: Path) -> None:
    root = f"task.root={fresh_colored.parent / 'images'}"
    evaluate(fresh_colored, "protocol=[linear,quality]", root)
    file = fresh_colored / "evaluate" / "summary.json"
    before = file.read_text()
    with pytest.raises(UserError, match="dense"):
        evaluate(fresh_colored, "protocol=[dense]", root, "overwrite=true")
    assert file.read_text() == before
    summary = json.loads(before)
    results = summary["checkpoints"][summary["checkpoint"]]["results"]
    results["linear"]["rows"] = results["quality"]["rows"] = {}
    file.write_text(json.dumps(summary))
    evaluate(fresh_colored, "protocol=[linear]", root, "overwrite=true")
    assert read_scores(fresh_colored)["linear"]
    assert read_scores(fresh_colored)["quality"] == {}


def test_an_interrupted_evaluation_is_continued(fresh: Path, monkeypatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hjepa.tasks.evaluate.linear_knn.knn", interrupt)
        with pytest.raises(UserError, match="Interrupted"):
            evaluate(fresh, "protocol=[linear,knn]")
    assert read_summary(fresh / "evaluate")["status"] == "unfinished"
    stored = read_scores(fresh)
    assert set(stored) == {"linear"}
    with monkeypatch.context() as patch:
        patch.setattr("hjepa.metrics.probes.logistic", interrupt)
        evaluate(fresh, "protocol=[linear,knn]")
    assert read_summary(fresh / "evaluate")["status"] == "finished"
    assert read_scores(fresh)["linear"] == stored["linear"]


def test_seeds_are_shown_with_mean_and_standard_deviation(seeds: Path, tmp_path: Path) -> None:
    shutil.copytree(seeds, tmp_path / "runs")
    shutil.copytree(seeds / "s0", tmp_path / "runs" / "no_checkpoint")
    shutil.rmtree(tmp_path / "runs" / "no_checkpoint" / "checkpoints")
    score = evaluate(tmp_path / "runs", "protocol=[linear]")
    (group,) = read_summary(tmp_path / "runs" / "evaluate")["groups"]
    each = [read_scores(tmp_path / "runs" / name)["linear"] for name in ("s0", "s1")]
    for source, columns in group["means"]["linear"].items():
        values = [rows[source]["whole"] for rows in each]
        assert columns["whole"] == pytest.approx(mean(values))
        assert columns["whole std"] == pytest.approx(stdev(values))
    assert score == mean(rows["trained/block 2"]["part"] for rows in each)
    text = (tmp_path / "runs" / "evaluate" / "table.txt").read_text()
    assert "seed 0" in text
    assert "no_checkpoint" not in text
    assert "seed 1" in text


def test_a_copy_of_a_run_does_not_count_twice_in_the_statistics_over_seeds(seeds: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(seeds, tmp_path / "runs")
    shutil.copytree(seeds / "s1", tmp_path / "runs" / "s1_copy")
    evaluate(tmp_path / "runs", "protocol=[quality]", "task.depths=[2]", "protocol.quality.images=5")
    (group,) = read_summary(tmp_path / "runs" / "evaluate")["groups"]
    assert [Path(folder).name for folder in group["runs"]] == ["s0", "s1"]
    assert "s1_copy has the config and the seed of" in capsys.readouterr().out


def test_a_run_that_cannot_be_evaluated_does_not_keep_others_from_it(seeds: Path, tmp_path: Path, caplog) -> None:
    runs = Path(shutil.copytree(seeds, tmp_path / "runs"))
    shutil.copytree(seeds / "s0", runs / "a")  # comes before the others
    config = (runs / "a" / "config.yaml").read_text()
    (runs / "a" / "config.yaml").write_text(re.sub(r"_target_: hjepa\.data\.\w+", "_target_: hjepa.data.Moved", config))
    options = ("protocol=[quality]", "task.depths=[2]", "protocol.quality.images=5")
    with pytest.raises(UserError, match=r"^1 of 3 runs could not be evaluated: .*runs/a; see the warnings above\.$"):
        evaluate(runs, *options)
    assert f"{runs / 'a'} was not evaluated: " in caplog.text
    (group,) = read_summary(runs / "evaluate")["groups"]
    assert [Path(folder).name for folder in group["runs"]] == ["s0", "s1"]


def test_linear_and_knn_agree_with_scikit_learn_on_the_same_features(fresh: Path) -> None:
    from hjepa.config.schema import resolve
    from hjepa.data.shapes import Shapes
    from hjepa.tasks.evaluate.features import EvalData, Features
    from hjepa.tasks.trained_run import load_run

    evaluate(fresh, "protocol=[linear,knn]", "protocol.linear.penalties=[0.01]")
    run = load_run(resolve(compose(*EVALUATE[1:], f"run={fresh}")), None, None)
    assert isinstance(run.dataset, Shapes)
    data = EvalData(run.dataset, run.config["dataset"], "test", None, None)
    labels, true_labels = (data.subsets[subset].labels["part"].numpy() for subset in ("train", "test"))
    rows, num_sources = read_scores(fresh), 0
    for source, x, y in Features(run, data, fresh / "evaluate" / "features", [1, 2], 128).sources():
        linear = LogisticRegression(C=1 / (0.01 * len(x)), max_iter=2000).fit(x.numpy(), labels)
        assert rows["linear"][source]["part"] == pytest.approx(linear.score(y.numpy(), true_labels), abs=0.003)
        vote = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp(-d / 0.07)).fit(x.numpy(), labels)
        assert rows["knn"][source]["part"] == pytest.approx(vote.score(y.numpy(), true_labels), abs=0.003)
        num_sources += 1
    assert num_sources == len(rows["linear"])


def test_transfer_scores_the_features_of_other_images(fresh: Path, colored: Path, tmp_path: Path) -> None:
    write_color_images(tmp_path / "small", "train", 12, size=24)
    write_color_images(tmp_path / "small", "test", 4, size=24)
    other = ("dataset@protocol.transfer.dataset=image_folder", f"protocol.transfer.dataset.root={tmp_path}/small")
    evaluate(fresh, "protocol=[transfer]", *other)
    rows = read_scores(fresh)["transfer"]
    assert rows["trained/block 2"] == {"class/linear": 1.0, "class/knn": 1.0}
    assert rows["pixels"]["class/linear"] == 1.0


def test_fine_tuning_learns_and_does_not_change_the_run(fresh_colored: Path) -> None:
    before = (fresh_colored / "checkpoints" / "latest.pt").read_bytes()
    evaluate(fresh_colored, "protocol=[finetune]", "protocol.finetune.epochs=8", "protocol.finetune.batch_size=16")
    rows = read_scores(fresh_colored)["finetune"]
    assert rows["trained/block 2"]["class"] == 1.0
    assert (fresh_colored / "checkpoints" / "latest.pt").read_bytes() == before


def remove_class(folder: Path) -> None:
    shutil.rmtree(folder.parent / "images" / "test" / "class1")


def remove_test(folder: Path) -> None:
    shutil.rmtree(folder.parent / "images" / "test")


def remove_labels(folder: Path, *splits: str) -> None:
    for split in splits or ("train", "test"):
        images = folder.parent / "images" / split
        for file in sorted(images.glob("*/*.png")):
            file.rename(images / f"{file.parent.name}-{file.name}")
        for empty in images.glob("class*/"):
            empty.rmdir()


def unchanged(folder: Path) -> None:
    """Leave the run as it is."""


@pytest.mark.parametrize(
    ("break_it", "options", "word"),
    [
        (unchanged, ("protocol=[]",), "contains no protocol"),
        (unchanged, ("protocol=[dense]",), r"protocol=\[dense\] is for runs on dataset=shapes"),
        (unchanged, ("protocol=[transfer]",), r"dataset@protocol.transfer.dataset=cifar100"),
        (
            unchanged,
            ("protocol=[transfer]", "dataset@protocol.transfer.dataset=image_folder", "protocol.transfer.dataset.root=nowhere"),
            r"In protocol\.transfer, dataset\.root.*nowhere",
        ),
        (unchanged, ("task.depths=[3]",), "has 2 blocks"),
        (unchanged, ("task.train_images=0",), "task.train_images=0"),
        (unchanged, ("protocol=[fewshot]", "protocol.fewshot.shots=[0]"), r"protocol\.fewshot\.shots=\[0\]: expected"),
        (unchanged, ("protocol=[fewshot]", "protocol.fewshot.shares=[1.5]"), r"protocol\.fewshot\.shares=\[1\.5\]: expected"),
        (unchanged, ("protocol=[fewshot]", "protocol.fewshot.shots=[]", "protocol.fewshot.shares=[]"), "at least one number"),
        (unchanged, ("protocol=[linear]", "protocol.linear.penalties=[]"), "at least one penalty"),
        (unchanged, ("protocol=[quality]", "protocol.quality.views=1"), "at least 2 of each"),
        (unchanged, ("protocol=[fewshot]", "protocol.fewshot.shots=[17]"), "only 16 images to sample from"),
        (unchanged, ("protocol=[finetune]", "protocol.finetune.batch_size=49"), "at most 48"),
        (unchanged, ("task.checkpoint=epoch-00009",), "this run has best"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), (), "stopped before its first one"),
        (lambda folder: (folder / "config.yaml").write_text("seed: 0\n"), (), "another version of hjepa"),
        (remove_class, (), "class1 only in its train split"),
        (remove_test, (), "task.split=validation"),
        (remove_labels, (), "have no labels"),
        (lambda folder: remove_labels(folder, "test"), (), "test images have no labels; .*task.split=validation"),
        (lambda folder: shutil.rmtree(folder.parent / "images"), ("protocol=all",), "is not a folder"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(fresh_colored: Path, break_it: Callable, options, word: str) -> None:
    break_it(fresh_colored)
    with pytest.raises(UserError, match=word) as error:
        evaluate(fresh_colored, f"task.root={fresh_colored.parent}/images", *options)
    assert "\n" not in str(error.value)
    assert not list(fresh_colored.glob("evaluate/features/*"))


def test_features_of_unlabeled_images_have_a_quality(fresh_colored: Path, capsys) -> None:
    remove_labels(fresh_colored)
    evaluate(fresh_colored, f"task.root={fresh_colored.parent}/images", "protocol=all", "protocol.quality.images=5")
    assert set(read_scores(fresh_colored)) == {"quality"}
    assert "linear is left out: The training images have no labels" in capsys.readouterr().out


def test_an_evaluation_without_an_applicable_protocol_fails(fresh_colored: Path, capsys) -> None:
    with pytest.raises(UserError, match="No protocol can evaluate this run"):
        evaluate(fresh_colored, "protocol=[dense]", "+protocol.skip_inapplicable=true")


def test_unknown_protocols_are_refused_with_the_known_ones() -> None:
    with pytest.raises(MissingConfigException) as error:
        compose(*EVALUATE, "protocol=[lineer]")
    sentence = format_hydra_error(error.value, [])
    assert sentence.startswith("protocol=lineer is not an option; did you mean linear?")
    assert all(name in sentence for name in ("knn", "fewshot", "all"))


def test_only_evaluations_have_protocols() -> None:
    assert "protocol" not in compose("task=train")
    assert list(compose("task=evaluate").protocol) == ["linear", "knn", "quality"]


def test_an_evaluation_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a run folder"):
        run_config(compose(*EVALUATE))
    with pytest.raises(UserError, match="contains none"):
        evaluate(tmp_path)


def test_trackers_receive_every_score_once(run, tmp_path: Path) -> None:
    import mlflow

    prepare_database(tmp_path)
    run("name=t", "tracking=[mlflow]", "tracking.mlflow.system_metrics=false", "train.epochs=1")
    folder = tmp_path / "default" / "t"
    for _ in range(2):
        options = ("tracking=[mlflow]", f"output_root={tmp_path}", "protocol=[knn]", "task.depths=[2]")
        run_config(compose(*EVALUATE[:3], f"run={folder}", *options))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = read_summary(folder)["run_id"]
    for source, columns in read_scores(folder)["knn"].items():
        for column, value in columns.items():
            (point,) = client.get_metric_history(run_id, f"evaluate/knn/{source}/{column}")
            assert (point.value, point.step) == (value, 9)
    assert {file.path for file in client.list_artifacts(run_id, "evaluate")} == {"evaluate/summary.json", "evaluate/table.txt"}
    assert json.loads((folder / "evaluate" / "summary.json").read_text())["run_id"] == run_id
