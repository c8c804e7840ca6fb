"""The scores of an evaluation against their formulas, the labels of patches against the images, and the tables."""

import pytest
import torch

from hjepa.data.shapes import PARTS, generate, patch_parts
from hjepa.distributed.seeding import generator
from hjepa.metrics.probes import logistic
from hjepa.metrics.spectrum import alpha_req, feature_statistics, lidar
from hjepa.tasks.evaluate.dense import NUM_CLASSES, DenseProbe
from hjepa.tasks.evaluate.few_shot import sample_subset
from hjepa.tasks.evaluate.finetune import cross_entropy
from hjepa.tasks.evaluate.tables import aggregate_runs, result_table, runs_table, to_text


def test_lidar_equals_its_definition() -> None:
    n, q, width = 30, 4, 6
    views = torch.randn(n, 1, width, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 7)
    views = views + 0.5 * torch.randn(n, q, width, generator=torch.Generator().manual_seed(1))
    means, grand = views.mean(1), views.mean((0, 1))
    between = sum(torch.outer(m - grand, m - grand) for m in means) / (n - 1)
    within = sum(torch.outer(v - m, v - m) for vs, m in zip(views, means, strict=True) for v in vs) / (n * (q - 1))
    within = within + 1e-4 * torch.eye(width)
    e, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(e**-0.5) @ vectors.T
    share = torch.linalg.eigvalsh(root @ between @ root)
    share = share / share.sum()
    assert lidar(views) == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-3)
    assert lidar(views[:1]) is None


@pytest.mark.parametrize(("exponent", "width"), [(1.0, 64), (2.5, 64), (0.5, 12)])
def test_alpha_req_finds_the_exponent_of_a_power_law(exponent: float, width: int) -> None:
    basis = torch.linalg.qr(torch.randn(500, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    features = basis * torch.arange(1, width + 1).double().pow(-exponent / 2)
    assert alpha_req(features) == pytest.approx(exponent, abs=1e-6)


def test_identical_features_have_statistics_too() -> None:
    statistics = feature_statistics(torch.ones(50, 8))
    assert statistics["std"] == 0
    assert statistics["rankme"] == pytest.approx(1, abs=1e-3)
    assert "alpha" not in statistics


@pytest.mark.parametrize("rows", [40, 400])
def test_the_probe_reaches_the_optimum_on_features_of_very_different_scales(rows: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 100, generator=g) @ torch.diag(torch.logspace(0, -3, 100)) @ torch.randn(100, 100, generator=g)
    labels = torch.randint(4, (rows,), generator=g)
    model = logistic(x, labels, 4, 1e-3)
    bias = model(torch.zeros(1, 100))
    weight = (model(torch.eye(100)) - bias).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight + bias, labels) + 5e-4 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.norm() < 3e-3 * x.norm() / rows**0.5


def test_shots_are_sampled_from_every_class_and_depend_on_the_generator_only() -> None:
    labels = torch.tensor([0] * 30 + [1] * 7 + [-1] * 5 + [2] * 50)
    subset = sample_subset(labels, lambda members: 5, generator(0, "x"))
    assert labels[subset].bincount().tolist() == [5, 5, 5]
    assert len(subset.unique()) == 15
    assert torch.equal(subset, sample_subset(labels, lambda members: 5, generator(0, "x")))
    assert not torch.equal(subset, sample_subset(labels, lambda members: 5, generator(0, "y")))


def test_a_label_without_known_values_in_a_batch_does_not_change_the_loss_of_fine_tuning() -> None:
    logits = {"class": torch.randn(4, 3), "color": torch.randn(4, 2)}
    labels = {"class": torch.tensor([0, 2, -1, 1]), "color": torch.full((4,), -1)}
    assert cross_entropy(logits, labels) == cross_entropy(logits, {"class": labels["class"]})


def test_labels_of_patches_agree_with_the_images() -> None:
    images, labels = generate(60, 32, 7)
    pixel_classes = patch_parts(60, 32, 7, patch=1, coverage=0.9).view(60, 32, 32)
    background = patch_parts(60, 32, 7, patch=1, coverage=0.01).view(60, 32, 32) == 0
    luma = (images.float() / 255 * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    for image, label, classes, is_background in zip(luma, labels["part"], pixel_classes, background, strict=True):
        assert set(classes.unique().tolist()) == {0, 1 + int(label)}
        assert abs(image[classes > 0].mean() - image[is_background].mean()) > 0.3
    coarse = patch_parts(60, 32, 7, patch=4, coverage=0.25)
    assert coarse.shape == (60, 64)
    assert ((coarse > 0).sum(1) >= 3).all()


def test_patch_scores_are_accuracy_and_mean_intersection_over_union() -> None:
    labels = {"train": torch.arange(200) % NUM_CLASSES, "test": torch.tensor([0, 0, 0, 1])}
    patches = {
        "train": torch.nn.functional.one_hot(labels["train"], NUM_CLASSES).float(),
        "test": torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), NUM_CLASSES).float(),
    }
    scores = DenseProbe(1, 1, 0.25, 1e-3).score_patches(patches, labels)
    assert scores == {"accuracy": 0.75, "miou": pytest.approx((2 / 3 + 1 / 2) / 2)}


def test_patches_that_contain_their_label_are_classified_without_errors() -> None:
    labels = {"train": torch.arange(200) % NUM_CLASSES, "test": torch.arange(77) % NUM_CLASSES}
    patches = {subset: torch.nn.functional.one_hot(label, NUM_CLASSES).float() for subset, label in labels.items()}
    assert DenseProbe(1, 1, 0.25, 1e-3).score_patches(patches, labels) == {"accuracy": 1.0, "miou": 1.0}
    assert len(PARTS) + 1 == NUM_CLASSES


ROWS = {
    "trained/block 6": {"part/1 per class": 0.5, "part/1 per class std": 0.01, "whole/1 per class": 0.25},
    "pixels": {"part/1 per class": 0.4},
}


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_tables_show_a_row_per_label_and_standard_deviations_beside_the_means() -> None:
    assert words(to_text("title", result_table("fewshot", {"rows": ROWS}))) == [
        ["title"],
        ["1", "per", "class"],
        ["features", "label"],
        ["trained,", "block", "6", "part", "50.0%", "+-", "1.0%"],
        ["trained,", "block", "6", "whole", "25.0%"],
        ["pixels", "part", "40.0%"],
        ["pixels", "whole"],
    ]


def test_scores_that_are_not_fractions_are_shown_with_four_digits() -> None:
    rows = {"trained/block 6": {"std": 1.23456, "rank": 12.34567}}
    earlier_version, this_version = {"rows": rows}, {"rows": rows, "percent": False}
    assert words(to_text("title", result_table("quality", earlier_version)))[-1] == ["trained,", "block", "6", "1.235", "12.35"]
    assert result_table("another", this_version).equals(result_table("quality", earlier_version))


def test_tables_of_several_runs_show_every_run_and_the_mean() -> None:
    runs = {"seed 0": {"rows": {"pixels": {"class": 0.5}}}, "seed 1": {"rows": {"pixels": {"class": 0.7}}}}
    assert words(to_text("title", runs_table("linear", runs)))[3:] == [
        ["pixels", "seed", "0", "50.0%"],
        ["pixels", "seed", "1", "70.0%"],
        ["pixels", "mean", "60.0%", "+-", "14.1%"],
    ]


def test_only_scores_that_all_runs_have_are_averaged() -> None:
    runs = {"a": {"x": {"k": 0.5, "k std": 0.1, "l": 1.0}, "y": {"k": 1.0}}, "b": {"x": {"k": 0.7}}}
    assert aggregate_runs(runs) == {"x": {"k": pytest.approx(0.6), "k std": pytest.approx(0.1414, abs=1e-4)}}
