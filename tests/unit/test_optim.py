"""Optimizers: each equals its formula, learning rates follow the parameter names, and the state resumes bit for bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.optim.optimizers import CombinedOptimizer, set_hyperparameters
from hjepa.optim.soap import SOAP, project, project_back
from tests.helpers.runs import VIEWS, build_components, trainer

OPTIMIZERS = ("adamw", "sgd", "soap", "muon", "lars")
BETAS, EPS = (0.9, 0.95), 1e-8


def soap(params: Any, **options: Any) -> SOAP:
    """Return SOAP with the default options of these tests."""
    defaults = {"lr": 0.01, "weight_decay": 0.1, "betas": BETAS, "eps": EPS, "frequency": 3, "max_dim": 100}
    return SOAP(params, **(defaults | options))


def gradients(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return random gradients whose row and column scales change from one to the next, so that eigenvalues change order."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=dtype)
        * torch.rand(shape[-1:], generator=generator, dtype=dtype).mul(3).exp()
        * torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=generator, dtype=dtype).mul(3).exp()
        for _ in range(count)
    ]


def descend(optimizer: Any, p: Tensor, steps: list[Tensor]) -> None:
    """Take a step with each of the gradients."""
    for g in steps:
        p.grad = g.clone()
        optimizer.step()


# -- SOAP --------------------------------------------------------------------------------------------------------------


def gram_schmidt(columns: Tensor) -> Tensor:
    """Return the columns, each orthogonalized against those before it (twice, because of rounding) and normalized."""
    done: list[Tensor] = []
    for column in columns.T:
        for _ in range(2):
            for other in done:
                column = column - other * (other @ column)
        done.append(column / column.norm())
    return torch.stack(done, dim=1)


def dense_soap(weight: Tensor, steps: list[Tensor], lr: float, decay: float, frequency: int, bases: list[Tensor]) -> Tensor:
    """Run algorithm 3 of the paper on the vectorized matrix, with a dense basis kron(Q_L, Q_R) and permutation matrices.

    The first bases are arguments, because they are not unique if the first gradient has no full rank; None stands for a side
    that is not rotated.
    """
    m, n = weight.shape
    rotate = [basis is not None for basis in bases]
    w, mean, square = weight.flatten(), torch.zeros(m * n).double(), torch.zeros(m * n).double()
    factors = [torch.zeros(m, m).double(), torch.zeros(n, n).double()]
    bases = [torch.eye(size).double() if basis is None else basis for size, basis in zip((m, n), bases, strict=True)]
    num_moved = 0
    for t, g in enumerate(steps, start=1):
        basis = torch.kron(*bases)
        rotated = basis.T @ g.flatten()
        mean = BETAS[0] * mean + (1 - BETAS[0]) * g.flatten()
        square = BETAS[1] * square + (1 - BETAS[1]) * rotated**2
        first, second = basis.T @ mean / (1 - BETAS[0] ** t), square / (1 - BETAS[1] ** t)
        w = w - lr * decay * w - lr * basis @ (first / (second.sqrt() + EPS))
        factors = [BETAS[1] * f + (1 - BETAS[1]) * x for f, x in zip(factors, (g @ g.T, g.T @ g), strict=True)]
        if t % frequency == 0:
            permutations = [torch.eye(m).double(), torch.eye(n).double()]
            for i in (0, 1):
                if rotate[i]:
                    order = (bases[i].T @ factors[i] @ bases[i]).diag().argsort(descending=True)
                    num_moved += int((order != torch.arange(len(order))).sum())
                    permutations[i] = permutations[i][:, order]
                    bases[i] = gram_schmidt(factors[i] @ bases[i] @ permutations[i])
            square = torch.kron(*permutations).T @ square
    assert num_moved, "no eigenvalues changed order, so that the permutation of the second moment is not tested"
    return w.view(m, n)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("max_dim", [100, 4])
def test_soap_equals_the_algorithm_of_the_paper(shape: tuple[int, int], max_dim: int) -> None:
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    start, steps, optimizer = p.detach().clone(), gradients(shape, 20), soap([p], max_dim=max_dim)
    descend(optimizer, p, steps[:1])
    bases = [optimizer.state[p].get(f"{side}_basis") for side in ("left", "right")]
    for size, basis, g in zip(shape, bases, (steps[0], steps[0].T), strict=True):
        assert (basis is None) == (size > max_dim)
        if basis is not None:
            torch.testing.assert_close(basis.T @ (g @ g.T) @ basis, torch.linalg.eigvalsh(g @ g.T).flip(0).diag())
    expected = dense_soap(start, steps, lr=0.01, decay=0.1, frequency=3, bases=bases)
    descend(optimizer, p, steps[1:])
    torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (8, 3, 2, 2), (2, 5, 2, 1)])
def test_bases_are_orthonormal_and_projecting_back_inverts_the_projection(shape: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = soap([p], frequency=2)
    descend(optimizer, p, gradients(shape, 7))
    g = torch.randn(shape, dtype=torch.float64).flatten(1)
    left, right = optimizer.state[p]["left_basis"], optimizer.state[p]["right_basis"]
    for basis in (left, right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double())
    assert not torch.allclose(project(g, left, right), g)
    torch.testing.assert_close(project_back(project(g, left, right), left, right), g)
    torch.testing.assert_close(project(g, left, right).norm(), g.norm())


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_bases_approach_the_eigenbases(shape: tuple[int, int]) -> None:
    """One power iteration per renewal is enough where the statistics stand still."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = soap([p], frequency=1)
    descend(optimizer, p, gradients(shape, 1) + gradients(shape, 2)[1:] * 400)
    for side in ("left", "right"):
        factor, basis = optimizer.state[p][side], optimizer.state[p][f"{side}_basis"]
        diagonal = basis.T @ factor @ basis
        assert (diagonal - diagonal.diag().diag()).abs().max() < 1e-6 * diagonal.abs().max()
        assert (diagonal.diag().diff() < 1e-12).all(), "largest first"


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_step_is_adams_in_the_rotated_basis(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In its own bases a gradient is diagonal, and Adam's first step is its sign: U V^T of its singular value decomposition."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    g = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    descend(soap([p], lr=1.0, weight_decay=0.0), p, [g])
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(p.detach(), -u @ v, atol=1e-4 if dtype == torch.float32 else 1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (7,), (4, 3, 2, 2), ()])
def test_soap_without_rotation_equals_adamw(shape: tuple[int, ...]) -> None:
    p, q = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    steps = [torch.randn(shape) for _ in range(6)]
    descend(soap([p], max_dim=3 if len(shape) > 1 else 100), p, steps)
    descend(torch.optim.AdamW([q], lr=0.01, weight_decay=0.1, betas=BETAS, eps=EPS), q, steps)
    torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


def test_soap_treats_a_convolution_as_the_flattened_matrix() -> None:
    steps = gradients((6, 3, 2, 2), 7)
    p = torch.nn.Parameter(torch.zeros(6, 3, 2, 2, dtype=torch.float64))
    q = torch.nn.Parameter(torch.zeros(6, 12, dtype=torch.float64))
    descend(soap([p]), p, steps)
    descend(soap([q]), q, [g.flatten(1) for g in steps])
    assert torch.equal(p.flatten(1), q)


def test_soap_beats_adamw_on_an_ill_conditioned_kronecker_quadratic() -> None:
    """Minimize tr(A W B W^T) / 2 with condition numbers of 1000 off the axes, each with the best of five learning rates."""

    def spd(size: int, seed: int) -> Tensor:
        q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).Q
        return q @ torch.logspace(0, -3, size).diag() @ q.T

    a, b, start = spd(12, 1), spd(8, 2), torch.randn(12, 8, generator=torch.Generator().manual_seed(3))

    def final(kind: str, lr: float) -> float:
        w = torch.nn.Parameter(start.clone())
        adam = {"lr": lr, "weight_decay": 0.0, "betas": BETAS, "eps": EPS}
        optimizer = soap([w], **adam, frequency=5) if kind == "soap" else torch.optim.AdamW([w], **adam)
        for t in range(200):
            optimizer.param_groups[0]["lr"] = lr * (1 - t / 200)
            w.grad = a @ w.detach() @ b
            optimizer.step()
        return float((w * (a @ w @ b)).detach().sum() / 2)

    best = {kind: min(final(kind, lr) for lr in (0.003, 0.01, 0.03, 0.1, 0.3)) for kind in ("soap", "adamw")}
    assert best["soap"] < best["adamw"] / 10, best


def test_the_state_of_soap_can_be_loaded_with_weights_only_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    steps = gradients((6, 4), 12, torch.float32)
    p = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = soap([p])
    descend(optimizer, p, steps[:5])
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(isinstance(x, Tensor) for state in saved["optimizer"]["state"].values() for x in state.values())
    q = torch.nn.Parameter(saved["p"])
    other = soap([q])
    other.load_state_dict(saved["optimizer"])
    descend(optimizer, p, steps[5:])
    descend(other, q, steps[5:])
    assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4])
def test_a_gradient_that_is_not_finite_reaches_the_weights_without_an_error(bad: float, at: int) -> None:
    """As with AdamW, the trainer has to notice and report it."""
    steps = gradients((6, 4), 7, torch.float32)
    steps[at][1, 2] = bad
    p = torch.nn.Parameter(torch.zeros(6, 4))
    descend(soap([p], frequency=2), p, steps)
    assert not p.isfinite().all()


def test_zero_gradients_leave_the_weights_unchanged() -> None:
    p = torch.nn.Parameter(torch.ones(6, 4))
    descend(soap([p], weight_decay=0.0), p, [torch.zeros(6, 4)] * 4)
    assert torch.equal(p, torch.ones(6, 4))


# -- Muon --------------------------------------------------------------------------------------------------------------


def random_gradients(model: torch.nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Set random gradients and return the value and the gradient of every parameter by name."""
    before = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
            before[name] = (p.detach().clone(), p.grad.clone())
    return before


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_muon
def test_muon_without_matrices_is_refused() -> None:
    views = "levels.project=[false]", "projector=none", "dataset.views=2", "masking=none"
    with pytest.raises(UserError, match=r"optimizer=muon needs 2-D weights, and this model has none; choose adamw or soap"):
        build_components(*VIEWS, "model=conv_nano", "optimizer=muon", *views)


@needs_muon
def test_muon_updates_matrices_orthogonally_and_leaves_the_rest_to_adamw() -> None:
    components = build_components("optimizer=muon", "levels=summary", "model.encoder.positions=learned")
    before = random_gradients(components.model)
    set_hyperparameters(components.optimizer, {"": 0.01}, 0.05)
    components.optimizer.step()
    kinds = {"orthogonal": 0, "adam": 0}
    for name, p in components.model.named_parameters():
        if name not in before:
            continue
        old, g = before[name]
        token = name.endswith(("pos_embed", "reg_token", "mask_tokens"))
        decay = 0.05 if p.ndim > 1 and not token else 0.0
        step = (old * (1 - 0.01 * decay) - p.detach()) / 0.01
        if p.ndim == 2 and not token:
            values = torch.linalg.svdvals(step / (0.2 * math.sqrt(max(p.shape))))
            assert 0.3 < values.min() < values.max() < 1.5, name
            kinds["orthogonal"] += 1
        else:
            torch.testing.assert_close(step, g.sign(), atol=1e-3, rtol=0)  # the first step of Adam
            kinds["adam"] += 1
    assert kinds["orthogonal"] == 2 * 4 + 1 * 5 + 2, "student, predictor with cross-attention, and the predictor's input and head"
    assert kinds["adam"] > 20


def test_a_torch_without_muon_is_refused_with_the_version_it_needs(monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match=r"optimizer=muon needs torch 2\.9 or later"):
        build_components("optimizer=muon")


# -- combined optimizers -----------------------------------------------------------------------------------------------


def pair() -> tuple[Tensor, Tensor, CombinedOptimizer]:
    """Return a matrix, a vector, and SOAP over the former combined with AdamW over the latter."""
    p, q = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [x], "part": "student", "scale": 1.0, "decay": x.ndim > 1} for x in (p, q)]
    return p, q, CombinedOptimizer(soap(groups[:1]), torch.optim.AdamW(groups[1:], fused=True))


def test_hyperparameters_reach_all_groups_of_a_combined_optimizer_also_after_loading() -> None:
    p, q, optimizer = pair()
    assert [g["params"][0] is x for g, x in zip(optimizer.param_groups, (p, q), strict=True)] == [True, True]
    optimizer.load_state_dict(pair()[2].state_dict())
    set_hyperparameters(optimizer, {"": 0.0}, 0.0)
    p.grad, q.grad = torch.ones(4, 3), torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 3))
    assert torch.equal(q, torch.ones(3)), "a learning rate of 0 changes nothing"
    set_hyperparameters(optimizer, {"": 0.1}, 0.0)
    optimizer.step()
    assert (p != 1).all()
    assert (q != 1).all()
    optimizer.zero_grad()
    assert p.grad is None
    assert q.grad is None


def test_hooks_of_a_combined_optimizer_run_once_per_step() -> None:
    p, q, optimizer = pair()
    p.grad, q.grad = torch.ones(4, 3), torch.ones(3)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_a_combined_optimizer_evaluates_a_closure_once() -> None:
    p, q, optimizer = pair()
    calls: list[Tensor] = []

    def closure() -> float:
        calls.append(loss := (p * q).square().sum())
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 12.0
    assert len(calls) == 1
    assert (p != 1).all()


@pytest.mark.parametrize("bad", [False, True])
def test_loss_scaling_skips_a_combined_step_that_overflows(bad: bool) -> None:
    p, q, optimizer = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = (p.sum() + q.sum()) * (math.inf if bad else 1.0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert bad or torch.equal(q.grad, torch.ones(3))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, torch.ones(4, 3)) == torch.equal(q, torch.ones(3)) == bad


# -- LARS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_lars_equals_its_formula(decay: float) -> None:
    components = build_components("optimizer=lars", "optimizer.momentum=0.8", "optimizer.trust=0.02")
    weights = {name: p.detach().clone() for name, p in components.model.named_parameters() if p.requires_grad}
    buffers = {name: torch.zeros_like(w) for name, w in weights.items()}
    matrices = {id(p) for group in components.optimizer.param_groups if group["decay"] for p in group["params"]}
    for lr in (0.3, 0.1, 0.2):
        named = random_gradients(components.model)
        set_hyperparameters(components.optimizer, {"": lr}, decay)
        components.optimizer.step()
        for name, p in components.model.named_parameters():
            if name in named:
                w, g = weights[name], named[name][1]
                update = g
                if id(p) in matrices:
                    update = 0.02 * w.norm() / (g.norm() + decay * w.norm()) * (g + decay * w)
                buffers[name] = 0.8 * buffers[name] + update
                weights[name] = w - lr * buffers[name]
                torch.testing.assert_close(p.detach(), weights[name], atol=1e-5, rtol=1e-5)


# -- learning rates by component and layer -----------------------------------------------------------------------------


def rates(components: Any) -> dict[str, float]:
    """Return the learning rate of every trainable parameter at a global rate of 1."""
    set_hyperparameters(components.optimizer, {"": 1.0}, 0.05)
    by_id = {id(p): group["lr"] for group in components.optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in components.model.named_parameters() if p.requires_grad}
    assert len(by_id) == len(named)
    return {name: by_id[id(p)] for name, p in named.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equal_rates_make_one_group_per_component_and_weight_decay(kind: str) -> None:
    components = build_components(f"optimizer={kind}", "levels=stacked")
    assert set(rates(components).values()) == {1.0}
    groups = [(group["part"], group["decay"]) for group in components.optimizer.param_groups]
    assert set(groups) == {(part, decay) for part in ("student", "predictor", "stacked1") for decay in (True, False)}
    assert len(groups) == 6 + (kind == "muon"), "Muon leaves the patch embedding to AdamW"
    assert all(group["weight_decay"] == 0.05 * group["decay"] for group in components.optimizer.param_groups)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_learning_rates_by_component_and_layer(kind: str) -> None:
    components = build_components(
        *(f"optimizer={kind}", "optimizer.layer_decay=0.5", "optimizer.lr_scale.student=2", "optimizer.lr_scale.predictor=3"),
        *("levels=summary", "model.encoder.positions=learned", "model.encoder.depth=3"),
    )
    lowest = ("student.patch_embed.", "student.pos_embed", "student.reg_token")
    for name, rate in rates(components).items():
        if name.startswith("predictor."):
            expected = 3.0
        elif name.startswith("student.norm."):
            expected = 2.0
        elif name.startswith(lowest):
            expected = 2.0 / 16
        else:
            expected = 2.0 * 0.5 ** (3 - int(name.split(".")[2]))
        assert rate == expected, name


def test_layer_decay_does_not_change_which_parameters_decay() -> None:
    components = build_components("optimizer.layer_decay=0.5", "levels=summary")
    names = {id(p): name for name, p in components.model.named_parameters()}
    for group in components.optimizer.param_groups:
        for name in (names[id(p)] for p in group["params"]):
            matrix = name.endswith("weight") and "norm" not in name
            assert group["decay"] == matrix, name


def test_every_level_can_follow_its_own_schedule() -> None:
    schedule = "schedule.parts.{}={{_target_: hjepa.optim.LinearSchedule, start: {}, end: 0.0}}"
    t = trainer(
        *("levels=stacked", "dataset.image_size=64", "schedule=constant", "schedule.lr.warmup_epochs=0", "levels.upper.pool=2"),
        "levels.upper.upper={_target_: hjepa.models.StackedLevel, _partial_: true, pool: 2, dim: 32, depth: 1, heads: 2, "
        "predictor: ${levels.upper.predictor}, masking: ${levels.upper.masking}, weight: 1.0, detach: true, upper: null}",
        *(f"+{schedule.format('stacked1', 0.5)}", f"+{schedule.format('stacked2', 0.25)}"),
    )
    t.train_step(t.get_batch(0), 0)
    rates = {(group["part"], group["lr"]) for group in t.components.optimizer.param_groups}
    assert rates == {("student", 2e-3), ("predictor", 2e-3), ("stacked1", 0.5), ("stacked2", 0.25)}


def test_a_schedule_of_an_unknown_component_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.parts\.stacked1 is not a trained component; choose among predictor, student"):
        trainer("+schedule.parts.stacked1={_target_: hjepa.optim.LinearSchedule, start: 1.0, end: 0.0}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+optimizer.lr_scale.teacher=0.5", "is not a trained component; choose among predictor, student"),
        ("optimizer.lr_scale.student=-1.0", r"expected dict\[str, NonNegativeFloat\] .*greater than or equal to 0"),
        ("optimizer.lr_scale.student=fast", "expected dict"),
        ("optimizer.layer_decay=0.0", "expected PositiveFraction"),
        ("optimizer.layer_decay=1.5", "expected PositiveFraction"),
        ("optimizer.lr=0.0", "expected PositiveFloat"),
        ("optimizer.betas=[0.9,1.0]", "both from 0 to below 1"),
        ("optimizer.betas=[0.9]", "decay of the first moment, decay of the second moment"),
    ],
)
def test_invalid_options_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_components(override)


# -- in the trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_trains_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    overrides = [f"optimizer={kind}", "optimizer.layer_decay=0.9", "model.encoder.drop_path=0.1"]
    overrides += ["optimizer.frequency=2"] if kind == "soap" else []
    uninterrupted = trainer(*overrides)
    uninterrupted.model.train()

    def train(t: Any, steps: range) -> None:
        for i in steps:
            terms = t.train_step(t.get_batch(i), i)
            assert all(value.isfinite() for value in terms.values())
            t.completed_steps = i + 1

    start = {name: p.detach().clone() for name, p in uninterrupted.model.named_parameters() if p.requires_grad}
    train(uninterrupted, range(3))
    torch.save(uninterrupted.state_dict(), tmp_path / "state.pt")
    train(uninterrupted, range(3, 6))
    changed = {name for name, p in uninterrupted.model.named_parameters() if name in start and not torch.equal(p, start[name])}
    assert changed == start.keys()
    resumed = trainer(*overrides)
    resumed.model.train()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, range(3, 6))
    pairs = zip(uninterrupted.model.state_dict().items(), resumed.model.state_dict().values(), strict=True)
    assert [name for (name, a), b in pairs if not torch.equal(a, b)] == []


@pytest.mark.thorough
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(kind: str) -> None:
    t = trainer(
        f"optimizer={kind}",
        "schedule=constant",
        "schedule.lr.warmup_epochs=0",
        "regularizer=none",
        "train.epochs=5",
    )
    batch = t.get_batch(0)
    losses = [float(t.train_step(batch, i)["loss"]) for i in range(40)]
    assert losses[-1] < 0.9 * losses[0]
