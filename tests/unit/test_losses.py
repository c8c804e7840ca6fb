"""Each loss equals its formula written out."""

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.losses import MSE, Contrastive, Cosine, Objective, PredictionLoss, SmoothL1, VICReg
from hjepa.losses.negatives import select_cells
from hjepa.models.output import LevelOutput, Output


def make_output() -> Output:
    g = torch.Generator().manual_seed(0)
    levels = [
        LevelOutput(
            name,
            weight,
            torch.randn(2, 3, t, 8, generator=g, requires_grad=True),
            torch.randn(2, 3, t, 8, generator=g),
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
    total, terms = Objective(loss, None).prediction_loss(out)
    expected = {level.name: formula(level.prediction, level.target) for level in out.levels}
    assert torch.allclose(total, expected["level1"] + 0.5 * expected["level2"])
    assert terms.keys() == expected.keys()
    assert all(torch.allclose(terms[k], expected[k]) for k in expected)
    assert not any(term.requires_grad for term in terms.values()), "logged terms are detached"


def test_constant_baseline_is_the_loss_of_the_mean_target() -> None:
    out = make_output()
    expected = sum(level.weight * ((level.target - level.target.flatten(0, 2).mean(0)) ** 2).mean() for level in out.levels)
    assert torch.allclose(Objective(MSE(), None).constant_baseline(out), expected)


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"loss\.beta=0: expected PositiveFloat"):
        check_node("loss", {"_target_": "hjepa.losses.SmoothL1", "beta": 0})


def test_objective_is_the_sum_of_both_and_logs_the_prediction_loss() -> None:
    out = make_output()
    regularizer = VICReg(1.0, 1.0, 0.04, [1.0])
    total, terms = Objective(MSE(), regularizer)(out)
    prediction = Objective(MSE(), None)(out)[0]
    assert torch.allclose(total, prediction + regularizer(out)[0])
    assert torch.allclose(terms["prediction"], prediction)


def test_levels_can_have_losses_of_their_own() -> None:
    out = make_output()
    first, second = (MSE().level_loss(out.levels[0]), Cosine().level_loss(out.levels[1]))
    assert torch.allclose(Objective(MSE(), None, {"level2": Cosine()})(out)[0], first + 0.5 * second)


@pytest.mark.parametrize("negatives", [None, 2, 9])
def test_the_contrastive_loss_is_cross_entropy_over_the_target_and_cells_of_other_images(negatives: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    prediction, cells = torch.randn(4, 2, 3, 8, generator=g), torch.randn(4, 2, 5, 8, generator=g)
    index = torch.randint(5, (4, 2, 3), generator=g)
    keys, losses = select_cells(cells, 2) if negatives == 2 else cells, []
    for image in range(4):
        for group in range(2):
            others = [F.normalize(keys[i, group], dim=-1) for i in range(4) if i != image]
            for query in range(3):
                target = F.normalize(cells[image, group, index[image, group, query]], dim=-1)
                logits = torch.cat([target[None], *others]) @ F.normalize(prediction[image, group, query], dim=-1) / 0.2
                losses.append(F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.long)))
    loss = Contrastive(temperature=0.2, negatives=negatives).level_loss(LevelOutput("level1", 1.0, prediction, cells, index))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_selected_cells_are_different_ones_of_each_image_and_all_places_are_selected_equally_often() -> None:
    places = torch.arange(9.0).view(1, 1, 9, 1).expand(18, 2, 9, 1)
    selected = select_cells(places, 4)
    assert selected.shape == (18, 2, 4, 1)
    assert all(len(set(row.flatten().tolist())) == 4 for row in selected.flatten(0, 1))
    assert selected.flatten().int().bincount().tolist() == [18 * 2 * 4 // 9] * 9


@pytest.mark.parametrize("loss", [MSE(), Contrastive(0.1)])
def test_queries_without_a_counterpart_do_not_count(loss: PredictionLoss) -> None:
    g = torch.Generator().manual_seed(0)
    cells, valid = torch.randn(4, 2, 3, 8, generator=g), torch.rand(4, 2, 3, generator=g) < 0.5
    predictions = [torch.randn(4, 2, 3, 8, generator=g) for _ in range(2)]
    mixed = torch.where(valid.unsqueeze(-1), *predictions)
    first, second = (loss.level_loss(LevelOutput("level1", 1.0, p, cells, None, valid)) for p in (predictions[0], mixed))
    torch.testing.assert_close(first, second)
    nothing = LevelOutput("level1", 1.0, mixed, cells, None, torch.zeros_like(valid))
    assert loss.level_loss(nothing) == 0
