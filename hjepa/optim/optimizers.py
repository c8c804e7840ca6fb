"""Optimizers: parameter groups (what decays, how fast each part and layer learns) and the rates of each step."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor
from torch.optim import AdamW, Optimizer

from hjepa.config.errors import UserError
from hjepa.models.hjepa import HJEPA
from hjepa.optim.soap import SOAP

Groups = list[dict[str, Any]]

TOKENS = ("mask_tokens", "reg_token", "pos_embed")  # matrices by shape alone


def parameter_groups(model: HJEPA, lr_scale: dict[str, float], layer_decay: float) -> Groups:
    """Trainable parameters by part, by weight decay (matrices, and the norms, biases and tokens, which do not decay) and by the
    factor of their learning rate.

    Args:
        model: student and predictor are trained.
        lr_scale: factor of a part's learning rate (see `part_of`); 1 for parts that are not named.
        layer_decay: a layer of the student learns this much slower than the one above it; 1 for no difference.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_rates(lr_scale, layer_decay, {part_of(name) for name in trainable})
    groups: dict[tuple[str, bool, float], list[Tensor]] = defaultdict(list)
    for name, p in trainable.items():
        part, decay = part_of(name), p.ndim > 1 and not name.endswith(TOKENS)
        scale = lr_scale.get(part, 1.0) * layer_decay ** layers_above(name, model.student.depth)
        groups[part, decay, scale].append(p)
    return [
        {"params": groups[part, decay, scale], "part": part, "decay": decay, "scale": scale}
        | ({} if decay else {"weight_decay": 0.0})
        for part, decay, scale in sorted(groups, reverse=True)
    ]


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: student, predictor, ..., stacked1 for the first stacked level."""
    words = name.split(".")
    stacked = next(i for i, word in enumerate(words) if word != "upper")
    return f"stacked{stacked}" if stacked else words[0]


def check_rates(lr_scale: dict[str, float], layer_decay: float, parts: set[str]) -> None:
    """Refuse factors of parts that are not trained, and factors out of range."""
    for part, scale in lr_scale.items():
        if part not in parts and scale != 1:
            raise UserError(f"optimizer.lr_scale.{part} names no trained part; there are {', '.join(sorted(parts))}.")
        if scale < 0:
            raise UserError(f"optimizer.lr_scale.{part}={scale}: expected 0 (the part stays as it is) or more.")
    if not 0 < layer_decay <= 1:
        raise UserError(f"optimizer.layer_decay={layer_decay}: expected above 0 and at most 1 (all layers learn alike).")


def layers_above(name: str, depth: int) -> int:
    """How many layers of the student are above a parameter, as BEiT counts them (Bao et al. 2022): 0 for the final norm and
    everything after the student, depth - i for block i, depth + 1 for the patch embedding, summary tokens and positions.
    """
    part, _, inside = name.partition(".")
    if part != "student" or inside.startswith("norm."):
        return 0
    return depth - int(inside.split(".")[1]) if inside.startswith("blocks.") else depth + 1


def split(groups: Groups, chosen: Callable[[Tensor], bool]) -> tuple[Groups, Groups]:
    """The decaying parameters that are chosen, and all others, each in groups of the same options."""
    parts: tuple[Groups, Groups] = ([], [])
    for group in groups:
        for part, wanted in zip(parts, (True, False), strict=True):
            params = [p for p in group["params"] if (group["decay"] and chosen(p)) == wanted]
            if params:
                part.append(group | {"params": params})
    return parts


class Combined(Optimizer):
    """Optimizers of disjoint parameters that act as one: `param_groups` are theirs, a step is a step of each.

    Args:
        optimizers: in the order in which their groups are listed and their states saved.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step of each; the closure, if any, is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of all."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of the same optimizers over the same parameters."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        # Loading replaces the groups of each, and those listed here must be the same objects for rates to reach them.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def create_adamw(
    model: HJEPA,
    lr: float,
    weight_decay: float,
    betas: list[float],
    eps: float,
    lr_scale: dict[str, float],
    layer_decay: float,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused into one kernel per group. For the rates, see `parameter_groups`."""
    return fused_adamw(parameter_groups(model, lr_scale, layer_decay), lr, weight_decay, betas, eps)


def fused_adamw(groups: Groups, lr: float, weight_decay: float, betas: list[float], eps: float) -> Optimizer:
    """torch's AdamW, in its fastest form."""
    beta1, beta2 = betas
    return AdamW(groups, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, fused=True)


def create_soap(
    model: HJEPA,
    lr: float,
    weight_decay: float,
    betas: list[float],
    eps: float,
    frequency: int,
    max_dim: int,
    lr_scale: dict[str, float],
    layer_decay: float,
) -> Optimizer:
    """SOAP (Vyas et al. 2024) for matrices, AdamW for norms, biases and tokens; see `hjepa.optim.create_soap.SOAP`."""
    matrices, others = split(parameter_groups(model, lr_scale, layer_decay), lambda p: True)
    beta1, beta2 = betas
    return Combined(
        SOAP(matrices, lr, weight_decay, (beta1, beta2), eps, frequency, max_dim),
        fused_adamw(others, lr, weight_decay, betas, eps),
    )


def create_muon(
    model: HJEPA,
    lr: float,
    weight_decay: float,
    momentum: float,
    betas: list[float],
    eps: float,
    lr_scale: dict[str, float],
    layer_decay: float,
) -> Optimizer:
    """Muon (Jordan et al. 2024) for the matrices of the blocks and heads, AdamW (`betas`, `eps`) for everything else.

    Orthogonal updates are scaled to the size that AdamW's usually have (Liu et al. 2025), so that one learning rate and
    weight decay serve both.

    Raises:
        UserError: this torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer=muon needs torch 2.9 or later and this is {torch.__version__}; update it, or use soap.")
    matrices, others = split(parameter_groups(model, lr_scale, layer_decay), lambda p: p.ndim == 2)
    scaled: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
    return Combined(
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **scaled),
        fused_adamw(others, lr, weight_decay, betas, eps),
    )


def create_lars(
    model: HJEPA,
    lr: float,
    weight_decay: float,
    momentum: float,
    trust: float,
    lr_scale: dict[str, float],
    layer_decay: float,
) -> Optimizer:
    """LARS (You et al. 2017): SGD with momentum, whose rate for a matrix w is also trust |w| / (|g| + weight_decay |w|).

    Norms, biases and tokens do not adapt, as in BYOL and VICReg.
    """
    groups = parameter_groups(model, lr_scale, layer_decay)
    adaptive = [group | {"always_adapt": group["decay"]} for group in groups]  # also where the weight decay is 0
    optimizer: Optimizer = Lars(adaptive, lr=lr, weight_decay=weight_decay, momentum=momentum, trust_coeff=trust)
    return optimizer


def set_rates(optimizer: Optimizer, lr: Mapping[str, float], weight_decay: float) -> None:
    """Set the learning rate of all groups, that of their part ("" for all others) by their factor, and the weight decay of those
    that decay.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr.get(group["part"], lr[""]) * group["scale"]
        if group["decay"]:
            group["weight_decay"] = weight_decay


def check_known_parts(lr: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Refuse learning rates of parts that the optimizer does not train."""
    trained = sorted({group["part"] for group in optimizer.param_groups})
    for part in lr:
        if part and part not in trained:
            raise UserError(f"schedule.parts.{part} names no trained part; there are {', '.join(trained)}.")
