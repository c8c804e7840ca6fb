"""Optimizers with parameter groups by component, weight decay and learning-rate factor.

An optimizer is a function `create_*(model, **options) -> Optimizer`, which the config instantiates. To add one, write such a
function on top of `parameter_groups`, list it in `hjepa/optim/__init__.pyi`, and add one YAML in conf/optimizer.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.optim.lars import Lars
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from hjepa.config.errors import UserError
from hjepa.config.types import (
    BetasFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
)
from hjepa.models.hjepa import HJEPA
from hjepa.optim.soap import SOAP

Groups = list[dict[str, Any]]

# They have the shape of matrices, but weight decay does not apply to them.
TOKENS = ("mask_tokens", "reg_token", "pos_embed", "relative_position_bias_table", "attention_biases")


def parameter_groups(model: HJEPA, lr_scale: dict[str, float], layer_decay: float) -> Groups:
    """Group the trainable parameters by component, weight decay and learning-rate factor.

    Weight decay applies to matrices; norms, biases and tokens do not decay.

    Args:
        model: Model whose student, predictor and stacked levels are trained.
        lr_scale: Learning-rate factor of each component (see `component_of`); 1 for components that are not listed.
        layer_decay: Learning-rate factor from one layer of the student to the layer below it; 1 for equal rates.

    Returns:
        Groups with the keys `params`, `part` (the component), `decay` (whether weight decay applies) and `scale` (the factor).
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_components(lr_scale, "optimizer.lr_scale", {component_of(name) for name in trainable})
    num_layers, layer_ids = model.student.num_layers, model.student.layer_ids()
    layers_above = {f"student.{name}": num_layers + 1 - layer for name, layer in layer_ids.items()}
    groups: dict[tuple[str, bool, float], list[Tensor]] = defaultdict(list)
    for name, p in trainable.items():
        component, decay = component_of(name), is_matrix(p) and not name.endswith(TOKENS)
        scale = lr_scale.get(component, 1.0) * layer_decay ** layers_above.get(name, 0)
        groups[component, decay, scale].append(p)
    return [
        {"params": groups[component, decay, scale], "part": component, "decay": decay, "scale": scale}
        | ({} if decay else {"weight_decay": 0.0})
        for component, decay, scale in sorted(groups, reverse=True)
    ]


def is_matrix(parameter: Tensor) -> bool:
    """Return True for weights of linear and convolutional layers; False for vectors, also with more dimensions of size 1."""
    return parameter.ndim > 1 and sum(size > 1 for size in parameter.shape) != 1


def component_of(name: str) -> str:
    """Return the component of a parameter: student, predictor, ..., or stacked1 for the first stacked level."""
    words = name.split(".")
    level = next(i for i, word in enumerate(words) if word != "upper")
    return f"stacked{level}" if level else words[0]


def check_components(values: Mapping[str, Any], option: str, trained: set[str]) -> None:
    """Raise `UserError` if an option sets a value for a component that is not trained; a factor of 1 is always accepted."""
    for component, value in values.items():
        if component not in trained and value != 1:
            raise UserError(f"{option}.{component} is not a trained component; choose among {', '.join(sorted(trained))}.")


def split_groups(groups: Groups, is_selected: Callable[[Tensor], bool]) -> tuple[Groups, Groups]:
    """Split groups in two: parameters with weight decay that `is_selected` accepts, and all others; options are kept."""

    def keep(selected: bool) -> Groups:
        kept = [(group, [p for p in group["params"] if (group["decay"] and is_selected(p)) == selected]) for group in groups]
        return [group | {"params": params} for group, params in kept if params]

    return keep(True), keep(False)


class CombinedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters behind the interface of one.

    `param_groups` lists the groups of all optimizers, and `step` takes a step of each.

    Args:
        *optimizers: Optimizers in the order in which their groups are listed and their states are saved.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        # Loading replaced the groups of each optimizer; `set_hyperparameters` must reach the new ones.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def create_adamw(
    model: HJEPA,
    lr: PositiveFloat,
    weight_decay: NonNegativeFloat,
    betas: BetasFloat,
    eps: PositiveFloat,
    lr_scale: dict[str, NonNegativeFloat],
    layer_decay: PositiveFraction,
) -> Optimizer:
    """Create AdamW (Loshchilov & Hutter 2019); see `parameter_groups` for the last two options."""
    return fused_adamw(parameter_groups(model, lr_scale, layer_decay), lr, weight_decay, betas, eps)


def fused_adamw(groups: Groups, lr: float, weight_decay: float, betas: list[float], eps: float) -> Optimizer:
    """Create torch's AdamW with its fused kernel, the fastest one."""
    beta1, beta2 = betas
    return AdamW(groups, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, fused=True)


def create_sgd(
    model: HJEPA,
    lr: PositiveFloat,
    weight_decay: NonNegativeFloat,
    momentum: OpenFraction,
    lr_scale: dict[str, NonNegativeFloat],
    layer_decay: PositiveFraction,
) -> Optimizer:
    """Create SGD with Nesterov momentum (Sutskever et al. 2013); see `parameter_groups` for the last two options."""
    groups = parameter_groups(model, lr_scale, layer_decay)
    return SGD(groups, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=True, fused=True)


def create_soap(
    model: HJEPA,
    lr: PositiveFloat,
    weight_decay: NonNegativeFloat,
    betas: BetasFloat,
    eps: PositiveFloat,
    frequency: PositiveInt,
    max_dim: NonNegativeInt,
    lr_scale: dict[str, NonNegativeFloat],
    layer_decay: PositiveFraction,
) -> Optimizer:
    """Create SOAP (Vyas et al. 2024) for matrices and AdamW for norms, biases and tokens; see `hjepa.optim.soap.SOAP`."""
    matrices, others = split_groups(parameter_groups(model, lr_scale, layer_decay), lambda p: True)
    beta1, beta2 = betas
    return CombinedOptimizer(
        SOAP(matrices, lr, weight_decay, (beta1, beta2), eps, frequency, max_dim),
        fused_adamw(others, lr, weight_decay, betas, eps),
    )


def create_muon(
    model: HJEPA,
    lr: PositiveFloat,
    weight_decay: NonNegativeFloat,
    momentum: Fraction,
    betas: BetasFloat,
    eps: PositiveFloat,
    lr_scale: dict[str, NonNegativeFloat],
    layer_decay: PositiveFraction,
) -> Optimizer:
    """Create Muon (Jordan et al. 2024) for 2-D weights and AdamW (`betas`, `eps`) for all other parameters.

    The orthogonal updates are scaled to the usual size of AdamW's (Liu et al. 2025), so that both optimizers work with the same
    learning rate and weight decay.

    Raises:
        UserError: The installed torch has no Muon, or the model has no 2-D weights.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer=muon needs torch 2.9 or later, and this is {torch.__version__}; update torch or use soap.")
    matrices, others = split_groups(parameter_groups(model, lr_scale, layer_decay), lambda p: p.ndim == 2)
    if not matrices:
        raise UserError("optimizer=muon needs 2-D weights, and this model has none; choose adamw or soap.")
    scaled: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
    return CombinedOptimizer(
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **scaled),
        fused_adamw(others, lr, weight_decay, betas, eps),
    )


def create_lars(
    model: HJEPA,
    lr: PositiveFloat,
    weight_decay: NonNegativeFloat,
    momentum: Fraction,
    trust: PositiveFloat,
    lr_scale: dict[str, NonNegativeFloat],
    layer_decay: PositiveFraction,
) -> Optimizer:
    """Create LARS (You et al. 2017): SGD with momentum and a learning rate that adapts to the norm of every matrix.

    The rate of a matrix w with gradient g is multiplied by trust |w| / (|g| + weight_decay |w|). As in BYOL and VICReg, the rates
    of norms, biases and tokens do not adapt.
    """
    groups = parameter_groups(model, lr_scale, layer_decay)
    adaptive = [group | {"always_adapt": group["decay"]} for group in groups]  # timm's Lars adapts only where weight decay is > 0
    optimizer: Optimizer = Lars(adaptive, lr=lr, weight_decay=weight_decay, momentum=momentum, trust_coeff=trust)
    return optimizer


def set_hyperparameters(optimizer: Optimizer, lr: Mapping[str, float], weight_decay: float) -> None:
    """Set the learning rate and weight decay of every parameter group.

    Args:
        optimizer: Optimizer over groups made by `parameter_groups`.
        lr: Learning rates by component; the key "" holds the rate of all components that are not listed.
        weight_decay: Weight decay of the groups that decay.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr.get(group["part"], lr[""]) * group["scale"]
        if group["decay"]:
            group["weight_decay"] = weight_decay
