"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321, algorithm 3).

For a matrix with gradient G, let Q_L and Q_R be the eigenbases of moving averages L of G G^T and R of G^T G. The second moment
of Adam is computed for the rotated gradient Q_L^T G Q_R. The first moment stays in the original space, so that it needs no
rotation when the bases change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SIDES = ("left", "right")  # the sides of a matrix that a basis rotates: its rows and its columns


def project(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return Q_L^T G Q_R for a matrix G [m, n] and orthonormal bases [m, m] and [n, n]; None stands for the identity."""
    rotated = matrix if left is None else left.mT @ matrix
    return rotated if right is None else rotated @ right


def project_back(rotated: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return Q_L G' Q_R^T, the inverse of `project`."""
    matrix = rotated if left is None else left @ rotated
    return matrix if right is None else matrix @ right.mT


class SOAP(Optimizer):
    """SOAP with bias correction and decoupled weight decay.

    Tensors with more than two dimensions are flattened to matrices; those with fewer than two are updated as by AdamW. The
    paper's implementation uses the first step to initialize the preconditioner and leaves the parameters unchanged. Here the
    first gradient defines the first bases, and the step is taken.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate, as in AdamW.
        weight_decay: Weight decay, as in AdamW.
        betas: Decay of the first moment, and decay of the second moment, L and R.
        eps: Term added to the square root of the second moment.
        frequency: Number of steps between two updates of the bases.
        max_dim: Sides of a matrix that are longer than this are not rotated (their basis is the identity).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        frequency: int,
        max_dim: int,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, options | {"frequency": frequency, "max_dim": max_dim})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.flatten(1) if p.ndim > 1 else p.grad, group)
        return loss

    def update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Apply Adam's update in the current bases, then update the bases with the gradient [m, n] or [n]."""
        (beta1, beta2), state = group["betas"], self.state[p]
        first = not state
        if first:
            initialize_state(state, gradient, beta2, group["max_dim"])
        # A loaded checkpoint may have moved the counter to the GPU, where reading it would make every step wait.
        state["step"] = state["step"].cpu() + 1
        count = int(state["step"])
        bases = state.get("left_basis"), state.get("right_basis")
        rotated = project(gradient, *bases)
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        scale = (state["square"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        direction = project(state["mean"], *bases) / scale
        if first and any(basis is not None for basis in bases):
            direction *= exceeds_rounding(rotated)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(project_back(direction, *bases).reshape(p.shape), alpha=-group["lr"] / (1 - beta1**count))
        if not first:
            update_factors(state, gradient, beta2)
        if count % group["frequency"] == 0:
            update_bases(state)


def initialize_state(state: dict[str, Any], gradient: Tensor, beta2: float, max_dim: int) -> None:
    """Create the state of a parameter from its first gradient: zero moments, and factors and bases of the rotated sides."""
    state["step"] = torch.tensor(0)
    state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for side, size in zip(SIDES, gradient.shape, strict=False):
        if gradient.ndim == 2 and size <= max_dim:
            state[side] = gradient.new_zeros(size, size)
    update_factors(state, gradient, beta2)
    for side in SIDES:
        if side in state:
            state[f"{side}_basis"] = eigenbasis(state[side])


def update_factors(state: dict[str, Any], gradient: Tensor, beta2: float) -> None:
    """Update the moving averages L [m, m] and R [n, n] with G G^T and G^T G of a gradient G [m, n]."""
    for side in SIDES:
        if side in state:
            g = gradient if side == "left" else gradient.mT
            state[side].addmm_(g, g.mT, beta=beta2, alpha=1 - beta2)


def update_bases(state: dict[str, Any]) -> None:
    """Move each basis towards the eigenbasis of its factor by one power iteration.

    QR orthogonalizes every column against those before it, so the columns are first sorted by their estimated eigenvalues. The
    second moment has one row or column per basis vector and is permuted in the same way.
    """
    for axis, side in enumerate(SIDES):
        if side in state:
            basis = state[f"{side}_basis"]
            power = state[side] @ basis
            order = (basis * power).sum(0).argsort(descending=True, stable=True)
            state[f"{side}_basis"] = orthonormal(power[:, order])
            state["square"] = state["square"].index_select(axis, order)


def eigenbasis(factor: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as columns, largest eigenvalue first."""
    # The trainer reports a gradient that is not finite; without the replacement, LAPACK would raise an obscure error first.
    finite = factor.nan_to_num(0.0, 0.0, 0.0)
    return decompose(finite, lambda x: torch.linalg.eigh(x).eigenvectors.flip(1))


def orthonormal(columns: Tensor) -> Tensor:
    """Return the columns, orthonormalized from the first to the last."""
    return decompose(columns, lambda x: torch.linalg.qr(x).Q)


def decompose(matrix: Tensor, decomposition: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a matrix decomposition, on the CPU if the device is an Apple GPU, which lacks some of them."""
    return decomposition(matrix.cpu() if matrix.device.type == "mps" else matrix).to(matrix.device).contiguous()


def exceeds_rounding(rotated: Tensor) -> Tensor:
    """Return a mask of the entries of a rotated gradient that exceed rounding error, by the usual tolerance of matrix ranks.

    In its own bases a gradient is diagonal. Adam divides by the magnitude, which would turn rounding errors beside the diagonal
    into full steps in random directions.
    """
    magnitude = rotated.abs()
    return magnitude > magnitude.amax() * max(rotated.shape) * torch.finfo(rotated.dtype).eps
