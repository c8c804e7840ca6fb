"""Probes agree with scikit-learn, and a collapse is detected and reported."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.data.datamodule import Split
from hjepa.losses import VICReg
from hjepa.metrics.collapse import collapse_statistics, describe_collapse, effective_rank
from hjepa.metrics.probes import Probe, accuracy, knn, logistic, standardize, subset


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and labels of overlapping classes, so that accuracies lie well below 1."""
    centers = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=g)
    return centers[labels] + 1.5 * torch.randn(n, 12, generator=g), labels


def test_linear_probe_agrees_with_scikit_learn() -> None:
    x, labels = blobs(2000, 1)
    y, truth = blobs(1000, 2)
    x, y = standardize(x, y)
    ours = accuracy(logistic(x, labels, 5, 1e-3)(y), truth)
    reference = LogisticRegression(C=1 / (1e-3 * len(x)), max_iter=1000).fit(x.numpy(), labels.numpy())
    assert ours == pytest.approx(reference.score(y.numpy(), truth.numpy()), abs=0.003)
    assert 0.5 < ours < 0.95


def test_knn_at_a_low_temperature_is_the_class_of_the_nearest_neighbor() -> None:
    x, labels = blobs(200, 1)
    y, _ = blobs(100, 2)
    nearest = torch.cosine_similarity(y.unsqueeze(1), x.unsqueeze(0), dim=2).argmax(1)
    assert torch.equal(knn(x, labels, y, neighbors=20, temperature=1e-4).argmax(1), labels[nearest])


def test_knn_agrees_with_scikit_learn() -> None:
    x, labels = blobs(2000, 1)
    y, truth = blobs(1000, 2)
    votes = knn(x, labels, y, neighbors=20, temperature=0.07, chunk=300)

    def weight(distance: np.ndarray) -> np.ndarray:
        return np.exp(-distance / 0.07)

    reference = KNeighborsClassifier(20, metric="cosine", weights=weight).fit(x.numpy(), labels.numpy())
    assert accuracy(votes, truth) == pytest.approx(reference.score(y.numpy(), truth.numpy()), abs=0.003)


def test_standardize_uses_only_the_statistics_of_the_training_features() -> None:
    x, y = torch.randn(100, 3) * 5 + 2, torch.randn(50, 3) - 7
    a, b = standardize(x, y)
    assert torch.allclose(a.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(b, (y - x.mean(0)) / x.std(0), atol=1e-5)


def test_rows_with_unknown_labels_neither_vote_nor_count() -> None:
    (x, labels), (y, truth) = blobs(80, 1), blobs(40, 2)
    known = torch.arange(len(x)) % 4 > 0
    probe = Probe(1, 80, 40, 5, 0.1, [0.01, 0.1], 16)
    some, some_truth = labels.where(known, -1), truth.where(torch.arange(len(y)) % 2 > 0, -1)
    for classify in (probe.linear, partial(knn, neighbors=5, temperature=0.1)):
        logits = classify(x, some, y)
        assert torch.equal(logits, classify(x[known], labels[known], y))
        assert accuracy(logits, some_truth) == accuracy(logits[1::2], truth[1::2])


def test_one_training_image_has_finite_features() -> None:
    assert torch.isfinite(torch.stack(standardize(torch.ones(1, 3), torch.zeros(1, 3)))).all()


def test_probe_uses_the_same_labeled_images_each_time() -> None:
    labels = torch.tensor([0, 1, -1, 2, -1, 1, 0, 2])
    split = Split(torch.arange(8).view(8, 1, 1, 1).expand(8, 3, 4, 4).to(torch.uint8), {"class": labels})
    first, second = subset(split, 5), subset(split, 5)
    assert torch.equal(first.images, second.images)
    assert len(first) == 5
    assert (first.labels["class"] >= 0).all()


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert effective_rank(torch.outer(torch.randn(50), torch.randn(8))) == pytest.approx(1, abs=1e-3)


def test_collapse_statistics_equal_their_formulas() -> None:
    features = torch.randn(40, 6) + 3
    statistics = collapse_statistics(features)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert statistics["cosine"] == pytest.approx(cosines[~torch.eye(40, dtype=torch.bool)].mean().item(), abs=1e-5)
    assert statistics["std"] == pytest.approx(features.std(0).mean().item(), abs=1e-6)


def test_identical_features_are_a_complete_collapse_even_if_layer_normalized() -> None:
    healthy = collapse_statistics(torch.nn.functional.layer_norm(torch.randn(64, 32), (32,)))
    same = torch.nn.functional.layer_norm(torch.randn(1, 32).expand(64, 32), (32,))
    assert "complete collapse" in (describe_collapse(collapse_statistics(same), healthy) or "")
    assert describe_collapse(healthy, healthy) is None


@pytest.mark.parametrize("noise", [0.0, 1e-7])
@pytest.mark.parametrize("size", [0.0, 1.0, 1000.0])
def test_features_that_do_not_differ_are_a_collapse_whatever_those_of_the_untrained_network(size: float, noise: float) -> None:
    features = (size * torch.ones(64, 32)) * (1 + noise * torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    same = collapse_statistics(features)
    assert "do not differ at all" in (describe_collapse(same, same) or "")
    assert "do not differ at all" in (describe_collapse(same, collapse_statistics(torch.randn(64, 32))) or "")


def test_a_single_image_shows_no_collapse() -> None:
    single = collapse_statistics(torch.ones(1, 8))
    assert describe_collapse(single, single) is None


def test_features_in_few_directions_are_a_dimensional_collapse() -> None:
    g = torch.Generator().manual_seed(0)
    healthy = torch.randn(256, 32, generator=g)
    flat = torch.randn(256, 2, generator=g) @ torch.randn(2, 32, generator=g)
    assert "dimensional collapse" in (describe_collapse(collapse_statistics(flat), collapse_statistics(healthy)) or "")


class CollapsingRegularizer(VICReg):
    """A regularizer that rewards identical features."""

    def terms(self, features, num_global):
        return {**super().terms(features, num_global), "variance": 100 * features.var(0).mean()}


@pytest.fixture
def collapsing(monkeypatch):
    monkeypatch.setattr("hjepa.losses.VICReg", CollapsingRegularizer)


COLLAPSE = ("regularizer=vicreg", "train.epochs=1", "train.batch_size=6", "optimizer.lr=0.01", "schedule.lr.warmup_epochs=0")


def test_a_collapsed_run_is_reported_as_collapsed_within_an_epoch(run, tmp_path, capsys, collapsing) -> None:
    run(*COLLAPSE, "name=c", "teacher.momentum.start=0.5", "teacher.momentum.end=0.5")
    assert "COLLAPSED" in capsys.readouterr().out
    summary = json.loads((tmp_path / "default" / "c" / "summary.json").read_text())
    assert summary["status"] == "collapsed"
    assert "collapse:" in summary["reason"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_stop_on_collapse_ends_the_run_for_good(run, tmp_path, collapsing, epochs: int) -> None:
    folder, momentum = tmp_path / "default" / "c", ("teacher.momentum.start=0.5", "teacher.momentum.end=0.5")
    results = []
    for _ in range(2):  # the same command trains no further, and says the same
        with pytest.raises(UserError, match=r"collapsed at step 36 .*collapse"):
            run(*COLLAPSE, *momentum, f"train.epochs={epochs}", "name=c", "train.stop_on_collapse=true")
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["status"] == "collapsed"
        results.append((summary["reason"], (folder / "metrics.jsonl").read_text()))
    assert results[0] == results[1]


@pytest.mark.thorough
def test_probing_does_not_disturb_training(run, tmp_path) -> None:
    weights = []
    for every in (1, 100):
        run(f"name=p{every}", f"probe.every={every}", "model.encoder.drop_path=0.2")
        weights.append(torch.load(tmp_path / "default" / f"p{every}" / "checkpoints" / "latest.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_the_loss_of_a_constant_prediction_is_recorded_with_the_held_out_loss(run, tmp_path) -> None:
    run("name=r")
    records = [json.loads(line) for line in (tmp_path / "default" / "r" / "metrics.jsonl").read_text().splitlines()]
    epochs = [r for r in records if "epoch" in r]
    assert all({"validation/loss", "validation/constant_loss"} <= r.keys() for r in epochs)
    assert all({"probe/linear", "untrained/linear"} <= r.keys() for r in epochs[-1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "probe.every=0: expected PositiveInt"),
        ({"penalties": [0.0]}, r"probe.penalties=\[0.0\]: expected list\[PositiveFloat\]"),
        ({"temperature": 0.0}, "probe.temperature=0.0: expected PositiveFloat"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_node("probe", {"_target_": "hjepa.metrics.Probe"} | options)


def test_a_probe_needs_a_penalty() -> None:
    with pytest.raises(UserError, match="at least one L2 penalty"):
        Probe(every=1, train_images=10, validation_images=10, neighbors=5, temperature=0.1, penalties=[], batch_size=8)
