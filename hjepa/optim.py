"""Optimizers: parameter groups (no weight decay on norms, biases, tokens, positions) and the rates of each step."""

import torch
from torch import nn
from torch.optim import Optimizer


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups of the trainable parameters: matrices, which decay, and the rest, which do not.

    Norm scales and biases have one dimension; mask, summary tokens and positions are matrices by shape alone.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tokens = ("mask_tokens", "reg_token", "pos_embed")
    matrices = [p for name, p in trainable if p.ndim > 1 and not name.endswith(tokens)]
    others = [p for name, p in trainable if p.ndim < 2 or name.endswith(tokens)]
    return [{"params": matrices, "decay": True}, {"params": others, "decay": False, "weight_decay": 0.0}]


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: list[float], eps: float = 1e-8) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused into one kernel per group."""
    beta1, beta2 = betas
    return torch.optim.AdamW(parameter_groups(model), lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, fused=True)


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups and the weight decay of those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay
