"""Probes against scikit-learn, and a collapse that is called a collapse."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from hjepa.config.errors import UserError
from hjepa.data.datamodule import Split
from hjepa.losses import MSE
from hjepa.metrics.collapse import effective_rank, feature_spread, verdict
from hjepa.metrics.probes import Probe, accuracy, knn, logistic, standardize, subset


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes, so that accuracies lie well below 1."""
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


def test_knn_agrees_with_scikit_learn() -> None:
    x, labels = blobs(2000, 1)
    y, truth = blobs(1000, 2)
    votes = knn(x, labels, y, neighbors=20, temperature=0.07, chunk=300)

    def weight(distance: np.ndarray) -> np.ndarray:
        return np.exp(-distance / 0.07)

    reference = KNeighborsClassifier(20, metric="cosine", weights=weight).fit(x.numpy(), labels.numpy())
    assert accuracy(votes, truth) == pytest.approx(reference.score(y.numpy(), truth.numpy()), abs=0.003)


def test_standardise_uses_training_statistics_only() -> None:
    x, y = torch.randn(100, 3) * 5 + 2, torch.randn(50, 3) - 7
    a, b = standardize(x, y)
    assert torch.allclose(a.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(b, (y - x.mean(0)) / x.std(0), atol=1e-5)


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


def test_spread_written_out() -> None:
    features = torch.randn(40, 6) + 3
    figures = feature_spread(features)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert figures["cosine"] == pytest.approx(cosines[~torch.eye(40, dtype=torch.bool)].mean().item(), abs=1e-5)
    assert figures["std"] == pytest.approx(features.std(0).mean().item(), abs=1e-6)


def test_identical_images_features_read_as_collapsed_even_when_layer_normed() -> None:
    healthy = feature_spread(torch.nn.functional.layer_norm(torch.randn(64, 32), (32,)))
    same = torch.nn.functional.layer_norm(torch.randn(1, 32).expand(64, 32), (32,))
    assert "complete collapse" in (verdict(feature_spread(same), healthy) or "")
    assert verdict(healthy, healthy) is None


def test_few_directions_read_as_dimensional_collapse() -> None:
    g = torch.Generator().manual_seed(0)
    healthy = torch.randn(256, 32, generator=g)
    flat = torch.randn(256, 2, generator=g) @ torch.randn(2, 32, generator=g)
    assert "dimensional collapse" in (verdict(feature_spread(flat), feature_spread(healthy)) or "")


class CollapsingLoss(MSE):
    """Rewards identical features, the shortcut that JEPAs must be kept from."""

    def __call__(self, output):
        total, terms = super().__call__(output)
        return total + 100 * output.features[0].var(0).mean(), terms


@pytest.fixture
def collapsing(monkeypatch):
    monkeypatch.setattr("hjepa.losses.MSE", CollapsingLoss)


COLLAPSE = ("loss=mse", "train.epochs=1", "train.batch_size=6", "optimizer.lr=0.01", "schedule.lr.warmup_epochs=0")


def test_a_collapsed_run_is_called_collapsed_within_an_epoch(run, tmp_path, capsys, collapsing) -> None:
    import json

    run(*COLLAPSE, "name=c", "teacher.momentum.start=0.5", "teacher.momentum.end=0.5")
    assert "COLLAPSED" in capsys.readouterr().out
    summary = json.loads((tmp_path / "default" / "c" / "summary.json").read_text())
    assert summary["status"] == "collapsed"
    assert "collapse:" in summary["reason"]


def test_stop_on_collapse_ends_the_run(run, tmp_path, collapsing) -> None:
    with pytest.raises(UserError, match=r"collapsed at step 36 .*collapse"):
        run(
            *COLLAPSE,
            "train.epochs=3",
            "name=c",
            "train.stop_on_collapse=true",
            "teacher.momentum.start=0.5",
            "teacher.momentum.end=0.5",
        )


def test_probing_does_not_disturb_training(run, tmp_path) -> None:
    weights = []
    for every in (1, 100):
        run(f"name=p{every}", f"probe.every={every}", "model.encoder.drop_path=0.2")
        weights.append(torch.load(tmp_path / "default" / f"p{every}" / "checkpoints" / "latest.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_constant_vector_loss_is_beside_the_held_out_loss(run, tmp_path) -> None:
    import json

    run("name=r")
    records = [json.loads(line) for line in (tmp_path / "default" / "r" / "metrics.jsonl").read_text().splitlines()]
    epochs = [r for r in records if "epoch" in r]
    assert all({"validation/loss", "validation/constant_loss"} <= r.keys() for r in epochs)
    assert all({"probe/linear", "untrained/linear"} <= r.keys() for r in epochs[-1:])


@pytest.mark.parametrize(
    ("options", "word"),
    [({"every": 0}, "probe.every=0"), ({"penalties": []}, "penalties"), ({"temperature": 0.0}, "temperature")],
)
def test_impossible_probes_are_refused(options, word) -> None:
    usual = {
        "every": 1,
        "train_images": 10,
        "validation_images": 10,
        "neighbors": 5,
        "temperature": 0.1,
        "penalties": [0.1],
        "batch_size": 8,
    }
    with pytest.raises(UserError, match=word):
        Probe(**(usual | options))
