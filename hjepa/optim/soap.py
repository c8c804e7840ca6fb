"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv:2409.11321, algorithm 3).

For a matrix with gradient G, moving averages L of G G^T and R of G^T G have eigenbases Q_L and Q_R, and Adam's second moment
is that of Q_L^T G Q_R. The first moment stays in the original space, so that it needs no change when the bases do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hjepa.config.errors import UserError

SIDES = ("left", "right")  # of a matrix: its rows and its columns


def project(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L^T G Q_R of a matrix [m, n] with orthonormal bases [m, m] and [n, n]; None stands for the identity."""
    rotated = matrix if left is None else left.mT @ matrix
    return rotated if right is None else rotated @ right


def project_back(rotated: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L G' Q_R^T, the inverse of `project`."""
    matrix = rotated if left is None else left @ rotated
    return matrix if right is None else matrix @ right.mT


class SOAP(Optimizer):
    """SOAP with bias correction and decoupled weight decay; tensors of more than two dimensions are flattened to matrices.

    The paper's implementation spends the first step on the preconditioner and moves nothing. Here the first gradient gives
    its own bases, and the step is taken.

    Args:
        params: parameters or groups of them; those of fewer than two dimensions are updated as by AdamW.
        lr, weight_decay: as in AdamW.
        betas: decay of the first moment; decay of the second moment, L and R.
        eps: added to the root of the second moment.
        frequency: steps from one renewal of the bases to the next.
        max_dim: a longer side of a matrix is left as it is (its basis is the identity).

    Raises:
        UserError: a frequency or max_dim that makes no sense.
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
        if frequency < 1 or max_dim < 0:
            raise UserError(f"optimizer.frequency={frequency}, max_dim={max_dim}: expected at least 1 and at least 0.")
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, options | {"frequency": frequency, "max_dim": max_dim})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
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
        """Adam's update between the bases, then what the gradient [m, n] (or [n]) changes about them."""
        (beta1, beta2), state = group["betas"], self.state[p]
        first = not state
        if first:
            begin(state, gradient, beta2, group["max_dim"])
        # A checkpoint may have been read to the device, and the count must not make every step wait for it.
        state["step"] = state["step"].cpu() + 1
        count = int(state["step"])
        bases = state.get("left_basis"), state.get("right_basis")
        rotated = project(gradient, *bases)
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        scale = (state["square"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        direction = project(state["mean"], *bases) / scale
        if first and any(basis is not None for basis in bases):
            direction *= significant(rotated)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(project_back(direction, *bases).reshape(p.shape), alpha=-group["lr"] / (1 - beta1**count))
        if not first:
            track(state, gradient, beta2)
        if count % group["frequency"] == 0:
            renew(state)


def begin(state: dict[str, Any], gradient: Tensor, beta2: float, max_dim: int) -> None:
    """Fill the state of a parameter from its first gradient: moments of zero, factors and bases of the sides to rotate."""
    state["step"] = torch.tensor(0)
    state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for side, size in zip(SIDES, gradient.shape, strict=False):
        if gradient.ndim == 2 and size <= max_dim:
            state[side] = gradient.new_zeros(size, size)
    track(state, gradient, beta2)
    for side in SIDES:
        if side in state:
            state[f"{side}_basis"] = eigenbasis(state[side])


def track(state: dict[str, Any], gradient: Tensor, beta2: float) -> None:
    """Move L [m, m] and R [n, n] towards G G^T and G^T G of a gradient [m, n]."""
    for side in SIDES:
        if side in state:
            g = gradient if side == "left" else gradient.mT
            state[side].addmm_(g, g.mT, beta=beta2, alpha=1 - beta2)


def renew(state: dict[str, Any]) -> None:
    """One power iteration of each basis towards the eigenbasis of its factor.

    QR orders as it orthogonalizes, so the columns are sorted first, by what they find of the factor; the second moment has a
    row or column for each of them, which moves along.
    """
    for axis, side in enumerate(SIDES):
        if side in state:
            basis = state[f"{side}_basis"]
            power = state[side] @ basis
            order = (basis * power).sum(0).argsort(descending=True, stable=True)
            state[f"{side}_basis"] = orthonormal(power[:, order])
            state["square"] = state["square"].index_select(axis, order)


def eigenbasis(factor: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, largest eigenvalue first."""
    # A gradient that is not finite spoils the update, which the trainer reports; it must not end in a message of LAPACK.
    finite = factor.nan_to_num(0.0, 0.0, 0.0)
    return on_capable(finite, lambda x: torch.linalg.eigh(x).eigenvectors.flip(1))


def orthonormal(columns: Tensor) -> Tensor:
    """The columns, each made orthogonal to those before it and of length 1."""
    return on_capable(columns, lambda x: torch.linalg.qr(x).Q)


def on_capable(matrix: Tensor, decompose: Callable[[Tensor], Tensor]) -> Tensor:
    """The decomposition of a matrix, on the CPU where the device (an Apple GPU) may have none."""
    return decompose(matrix.cpu() if matrix.device.type == "mps" else matrix).to(matrix.device).contiguous()


def significant(rotated: Tensor) -> Tensor:
    """Which entries of a gradient in its own bases are more than rounding error, by the tolerance that ranks are counted with.

    Such a gradient is diagonal, and Adam, which divides by the magnitude, would turn the remnants beside the diagonal into
    full steps in random directions.
    """
    size = rotated.abs()
    return size > size.amax() * max(rotated.shape) * torch.finfo(rotated.dtype).eps
