"""The figures of an evaluation against their formulas written out, and the labels of patches against the pictures."""

import pytest
import torch
from sklearn.metrics import jaccard_score

from hjepa.data.shapes import PARTS, generate, patch_parts
from hjepa.distributed.seeding import generator
from hjepa.metrics.probes import logistic
from hjepa.metrics.spectrum import alpha_req, feature_statistics, lidar
from hjepa.tasks.evaluate.dense import CLASSES, DenseProbe, mean_iou
from hjepa.tasks.evaluate.few_shot import draw
from hjepa.tasks.evaluate.tables import over_runs, table


def test_lidar_written_out() -> None:
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


@pytest.mark.parametrize(("exponent", "width"), [(1.0, 64), (2.5, 64), (0.5, 12)])
def test_alpha_req_finds_the_exponent_of_a_power_law(exponent: float, width: int) -> None:
    basis = torch.linalg.qr(torch.randn(500, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    features = basis * torch.arange(1, width + 1).double().pow(-exponent / 2)
    assert alpha_req(features) == pytest.approx(exponent, abs=1e-6)


def test_features_that_are_all_the_same_have_figures_too() -> None:
    found = feature_statistics(torch.ones(50, 8))
    assert found["std"] == 0
    assert found["rankme"] == pytest.approx(1, abs=1e-3)
    assert "alpha" not in found


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


def test_shots_are_so_many_of_every_class_and_the_same_each_time() -> None:
    labels = torch.tensor([0] * 30 + [1] * 7 + [-1] * 5 + [2] * 50)
    chosen = draw(labels, lambda members: 5, generator(0, "x"))
    assert labels[chosen].bincount().tolist() == [5, 5, 5]
    assert len(chosen.unique()) == 15
    assert torch.equal(chosen, draw(labels, lambda members: 5, generator(0, "x")))
    assert not torch.equal(chosen, draw(labels, lambda members: 5, generator(0, "y")))


def test_what_patches_show_is_what_the_images_show() -> None:
    images, labels = generate(60, 32, 7)
    shown = patch_parts(60, 32, 7, patch=1, coverage=0.9).view(60, 32, 32)
    nothing = patch_parts(60, 32, 7, patch=1, coverage=0.01).view(60, 32, 32) == 0
    luma = (images.float() / 255 * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    for image, label, there, background in zip(luma, labels["part"], shown, nothing, strict=True):
        assert set(there.unique().tolist()) == {0, 1 + int(label)}
        assert abs(image[there > 0].mean() - image[background].mean()) > 0.3
    coarse = patch_parts(60, 32, 7, patch=4, coverage=0.25)
    assert coarse.shape == (60, 64)
    assert ((coarse > 0).sum(1) >= 3).all()


def test_mean_iou_agrees_with_scikit_learn() -> None:
    g = torch.Generator().manual_seed(0)
    predicted, truth = (torch.randint(CLASSES, (500,), generator=g) for _ in range(2))
    predicted = torch.where(torch.rand(500, generator=g) < 0.5, truth, predicted)
    assert mean_iou(predicted, truth) == pytest.approx(jaccard_score(truth.numpy(), predicted.numpy(), average="macro"))


def test_patches_that_carry_their_label_are_all_right() -> None:
    truths = {"train": torch.arange(200) % CLASSES, "test": torch.arange(77) % CLASSES}
    patches = {role: torch.nn.functional.one_hot(truth, CLASSES).float() for role, truth in truths.items()}
    assert DenseProbe(1, 1, 0.25, 1e-3).judge(patches, truths) == {"accuracy": 1.0, "miou": 1.0}
    assert len(PARTS) + 1 == CLASSES


def test_tables_show_labels_as_rows_and_spreads_beside_their_means() -> None:
    rows = {"trained/block 6": {"part/1 per class": 0.5, "part/1 per class std": 0.01, "whole/1 per class": 0.25}}
    assert [line.split() for line in table("fewshot", "about", rows).splitlines()] == [
        ["about"],
        ["features", "label", "1", "per", "class"],
        ["trained,", "block", "6", "part", "50.0%", "+-", "1.0%"],
        ["trained,", "block", "6", "whole", "25.0%"],
    ]


def test_what_one_run_lacks_has_no_mean() -> None:
    runs = {"a": {"x": {"k": 0.5, "l": 1.0}, "y": {"k": 1.0}}, "b": {"x": {"k": 0.7}}}
    assert over_runs(runs) == {"x": {"k": pytest.approx(0.6), "k std": pytest.approx(0.1414, abs=1e-4)}}
