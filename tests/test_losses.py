"""Each loss against its formula written out."""

import pytest
import torch

from hjepa.errors import UserError
from hjepa.losses import MSE, Cosine, Objective, PredictionLoss, SmoothL1, VICReg
from hjepa.model import LevelOutput, Output


def output() -> Output:
    g = torch.Generator().manual_seed(0)
    levels = [
        LevelOutput(
            name,
            weight,
            torch.randn(2, 1, 3, t, 8, generator=g, requires_grad=True),
            torch.randn(2, 1, 3, t, 8, generator=g),
        )
        for name, weight, t in (("level1", 1.0, 4), ("level2", 0.5, 2))
    ]
    return Output(levels, torch.randn(6, 1, 8, generator=g, requires_grad=True))


def smooth_l1(d: torch.Tensor) -> torch.Tensor:
    beta = 0.5
    return torch.where(d.abs() < beta, 0.5 * d**2 / beta, d.abs() - 0.5 * beta).mean()


def cosine(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (1 - (p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))).mean()


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (SmoothL1(beta=0.5), lambda p, t: smooth_l1(p - t)),
        (MSE(), lambda p, t: ((p - t) ** 2).mean()),
        (Cosine(), cosine),
    ],
)
def test_formula_levels_and_weights(loss: PredictionLoss, formula) -> None:
    out = output()
    total, terms = loss(out)
    expected = {level.name: formula(level.prediction, level.target) for level in out.levels}
    assert torch.allclose(total, expected["level1"] + 0.5 * expected["level2"])
    assert terms.keys() == expected.keys()
    assert all(torch.allclose(terms[k], expected[k]) for k in expected)
    assert not any(term.requires_grad for term in terms.values()), "logged terms hold no graph"


def test_constant_is_the_loss_of_the_mean_vector() -> None:
    out = output()
    expected = sum(level.weight * ((level.target - level.target.flatten(0, 3).mean(0)) ** 2).mean() for level in out.levels)
    assert torch.allclose(MSE().constant(out), expected)


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match="beta=0"):
        SmoothL1(beta=0)


def test_vicreg_written_out() -> None:
    """Bardes et al. 2022, equations 1 to 5, per view and over pairs of views."""
    z = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0))
    total, terms = VICReg(variance=2.0, invariance=3.0, covariance=0.5)(Output([], z))
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
    z = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(0))
    assert "invariance" not in VICReg(1.0, 1.0, 0.04)(Output([], z))[1]
    _, terms = VICReg(1.0, 1.0, 0.04)(Output([], z.expand(6, 2, 4)))
    assert terms["invariance"] == 0, "views that agree cost nothing, however different the images are"


def test_vicreg_revives_collapsed_features() -> None:
    """Gradient descent on the regularizer alone spreads nearly identical features over all dimensions."""
    from hjepa.collapse import effective_rank

    z = torch.nn.Parameter(torch.ones(64, 8) + 1e-2 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0)))
    z.data += 1e-4 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    before = effective_rank((z - z.mean(0)).detach())
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        VICReg(1.0, 1.0, 0.04)(Output([], z.unsqueeze(1)))[0].backward()
        optimizer.step()
    assert before < 1.5
    assert effective_rank((z - z.mean(0)).detach()) > 7


def test_objective_is_the_sum_and_names_the_prediction() -> None:
    out = output()
    loss, regularizer = MSE(), VICReg(1.0, 1.0, 0.04)
    total, terms = Objective(loss, regularizer)(out)
    assert torch.allclose(total, loss(out)[0] + regularizer(out)[0])
    assert torch.allclose(terms["prediction"], loss(out)[0])
    assert torch.equal(Objective(loss, None)(out)[0], loss(out)[0])
