"""Each loss equals its formula written out."""

import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.losses import MSE, Cosine, Objective, PredictionLoss, SmoothL1, VICReg
from hjepa.models.hjepa import LevelOutput, Output


def make_output() -> Output:
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
    return Output(levels, [torch.randn(6, 1, 8, generator=g, requires_grad=True)])


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
def test_losses_equal_their_formulas_weighted_by_level(loss: PredictionLoss, formula) -> None:
    out = make_output()
    total, terms = loss(out)
    expected = {level.name: formula(level.prediction, level.target) for level in out.levels}
    assert torch.allclose(total, expected["level1"] + 0.5 * expected["level2"])
    assert terms.keys() == expected.keys()
    assert all(torch.allclose(terms[k], expected[k]) for k in expected)
    assert not any(term.requires_grad for term in terms.values()), "logged terms are detached"


def test_constant_baseline_is_the_loss_of_the_mean_target() -> None:
    out = make_output()
    expected = sum(level.weight * ((level.target - level.target.flatten(0, 3).mean(0)) ** 2).mean() for level in out.levels)
    assert torch.allclose(MSE().constant_baseline(out), expected)


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"loss\.beta=0: expected PositiveFloat"):
        check_node("loss", {"_target_": "hjepa.losses.SmoothL1", "beta": 0})


def test_objective_is_the_sum_of_both_and_logs_the_prediction_loss() -> None:
    out = make_output()
    loss, regularizer = MSE(), VICReg(1.0, 1.0, 0.04, [1.0])
    total, terms = Objective(loss, regularizer)(out)
    assert torch.allclose(total, loss(out)[0] + regularizer(out)[0])
    assert torch.allclose(terms["prediction"], loss(out)[0])
    assert torch.equal(Objective(loss, None)(out)[0], loss(out)[0])
