"""Regularizers equal their formulas written out, and revive collapsed features."""

import itertools
import math
from functools import cache

import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.losses import InfoNCE, Regularizer, SIGReg, VICReg
from hjepa.losses.statistics import epps_pulley
from hjepa.metrics.collapse import effective_rank
from hjepa.models.hjepa import Output
from tests.helpers.runs import build_components, trainer


def features(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_vicreg_equals_its_equations() -> None:
    """Compare with equations 1 to 5 of Bardes et al. 2022, for each view and all pairs of views."""
    z = features(7, 3, 5)
    total, terms = VICReg(variance=2.0, invariance=3.0, covariance=0.5, levels=[1.0])(Output([], [z]))
    n, views, d = z.shape
    variance = covariance = 0.0
    for view in range(views):
        x = z[:, view]
        variance += sum(max(0.0, 1 - (x[:, j].var() + 1e-4).sqrt().item()) for j in range(d)) / d / views
        c = sum(torch.outer(row, row) for row in x - x.mean(0)) / (n - 1)
        covariance += sum(c[i, j].item() ** 2 for i in range(d) for j in range(d) if i != j) / d / views
    pairs = [(a, b) for a in range(views) for b in range(a)]
    invariance = sum((z[:, a] - z[:, b]).square().mean().item() for a, b in pairs) / len(pairs)
    expected = {"variance": variance, "invariance": invariance, "covariance": covariance}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-5)
    assert total.item() == pytest.approx(2 * variance + 3 * invariance + 0.5 * covariance, abs=1e-5)
    assert not any(term.requires_grad for term in terms.values())


def test_vicreg_compares_views_of_the_same_image_only() -> None:
    z, vicreg = features(6, 1, 4), VICReg(1.0, 1.0, 0.04, [1.0])
    assert "invariance" not in vicreg(Output([], [z]))[1]
    _, terms = vicreg(Output([], [z.expand(6, 2, 4)]))
    assert terms["invariance"] == 0, "no penalty for equal views, however different the images are"


def test_epps_pulley_equals_its_integral() -> None:
    """Compare with the defining integral in complex numbers, on a fine grid of positive and negative t."""
    samples = features(50, 2) * 1.5 + 0.3
    t = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    expected = []
    for column in samples.double().T:
        empirical = sum(torch.exp(1j * t * x) for x in column) / len(column)
        integrand = (empirical - torch.exp(-(t**2) / 2)).abs() ** 2 * torch.exp(-(t**2) / 2)
        expected.append(len(column) * torch.trapezoid(integrand, t).item())
    assert epps_pulley(samples, knots=17, reach=3.0).item() == pytest.approx(sum(expected) / 2, rel=0.01)


def test_epps_pulley_separates_normal_samples_from_others() -> None:
    """The expectation is constant in N for normal samples and proportional to N for others."""

    def statistic(n: int, scale: float) -> float:
        return epps_pulley(features(n, 64) * scale, 17, 3.0).item()

    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))  # integral over all t of the variance
    assert statistic(4000, 1.0) == pytest.approx(expected, rel=0.3)
    assert statistic(4000, 0.3) > 100 * statistic(4000, 1.0)
    assert statistic(4000, 0.3) == pytest.approx(4 * statistic(1000, 0.3), rel=0.1)


def test_sigreg_pulls_views_to_the_mean_of_the_global_crops() -> None:
    z = features(5, 4, 3)
    _, terms = SIGReg(1.0, 1.0, directions=8, knots=17, reach=3.0, levels=[1.0])(Output([], [z], num_global=2))
    expected = sum((z[i, v] - (z[i, 0] + z[i, 1]) / 2).square().mean() for i in range(5) for v in range(4)) / 20
    assert torch.allclose(terms["invariance"], expected)


def test_infonce_equals_its_formula() -> None:
    """Compare with the loss of every pair of a view and another global crop, computed one by one."""
    z = features(4, 3, 5)
    total, terms = InfoNCE(contrast=2.0, temperature=0.5, levels=[1.0])(Output([], [z], num_global=2))
    costs = []
    for i, v, w in itertools.product(range(4), range(3), range(2)):
        if v != w:
            near = {(j, k): math.exp(torch.cosine_similarity(z[i, v], z[j, k], 0) / 0.5) for j in range(4) for k in range(2)}
            others = sum(value for (j, _), value in near.items() if j != i)
            costs.append(-math.log(near[i, w] / (near[i, w] + others)))
    assert terms["contrast"].item() == pytest.approx(sum(costs) / len(costs), rel=1e-5)
    assert total.item() == pytest.approx(2 * sum(costs) / len(costs), rel=1e-5)


def test_infonce_with_one_view_is_refused_before_the_run() -> None:
    with pytest.raises(UserError, match=r"InfoNCE compares views of an image.*set dataset\.views=2"):
        build_components("regularizer=infonce", "masking=multiblock")
    build_components("regularizer=infonce", "masking=multiblock", "dataset.local_views=1")
    build_components("regularizer=infonce", "masking=random", "masking.contexts=2")


@pytest.mark.parametrize("regularizer", [VICReg(1.0, 1.0, 0.04, [1.0]), SIGReg(1.0, 1.0, 64, 17, 3.0, [1.0])])
def test_each_regularizer_revives_collapsed_features(regularizer: Regularizer) -> None:
    """Gradient descent on the regularizer alone spreads nearly identical features over all dimensions."""
    torch.manual_seed(0)
    z = torch.nn.Parameter(torch.ones(64, 1, 8) + 1e-2 * torch.randn(64, 1, 1) + 1e-4 * torch.randn(64, 1, 8))
    before = effective_rank((z - z.mean(0)).detach().squeeze(1))
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        regularizer(Output([], [z]))[0].backward()
        optimizer.step()
    assert before < 1.5
    assert effective_rank((z - z.mean(0)).detach().squeeze(1)) > 7


@cache
def trained_rank(regularizer: str) -> float:
    """Return the effective rank of the student's features after a run whose teacher follows so fast that dimensions collapse."""
    t = trainer(
        *("levels=flat", f"regularizer={regularizer}", "schedule.lr.warmup_epochs=0", "optimizer.lr=3e-3"),
        *("teacher.momentum.start=0.5", "teacher.momentum.end=0.5", "train.batch_size=48", "train.epochs=60"),
    )
    for i in range(60):
        t.train_step(t.get_batch(i), i)
    z = t.model.student.features(t.components.dataset.normalize(t.images[:128])).detach()
    return effective_rank(z - z.mean(0))


@pytest.mark.thorough
@pytest.mark.parametrize("option", ["vicreg", "sigreg"])
def test_each_regularizer_raises_the_rank_of_a_collapsing_run(option: str) -> None:
    assert trained_rank(option) > 1.5 * trained_rank("none")


def test_levels_have_their_own_factors() -> None:
    first, second = features(6, 1, 4), features(6, 1, 4) * 0.3
    alone, _ = VICReg(1.0, 0.0, 0.5, [1.0])(Output([], [first]))
    other, _ = VICReg(1.0, 0.0, 0.5, [1.0])(Output([], [second]))
    both, terms = VICReg(1.0, 0.0, 0.5, [1.0, 0.25])(Output([], [first, second]))
    assert both.item() == pytest.approx(alone.item() + 0.25 * other.item())
    assert set(terms) == {"variance", "covariance", "variance_level2", "covariance_level2"}


@pytest.mark.parametrize(
    ("target", "option", "value"),
    [
        ("VICReg", "covariance", -1.0),
        ("VICReg", "levels", [1.0, -1.0]),
        ("SIGReg", "directions", 0),
        ("SIGReg", "reach", 0.0),
        ("InfoNCE", "temperature", 0.0),
    ],
)
def test_options_out_of_bounds_are_refused(target: str, option: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^regularizer\.{option}="):
        check_node("regularizer", {"_target_": f"hjepa.losses.{target}", option: value})


def test_a_regularizer_needs_a_level_and_a_quadrature_two_points() -> None:
    with pytest.raises(UserError, match=r"regularizer\.levels=\[\]"):
        VICReg(1.0, 1.0, 1.0, [])
    with pytest.raises(UserError, match=r"regularizer\.knots=1"):
        SIGReg(1.0, 1.0, 8, 1, 3.0, [1.0])
