"""Batch norms with the statistics of the whole batch, over all processes.

PyTorch's SyncBatchNorm does this on GPUs only. On a CPU, `CPUSyncBatchNorm` computes the same.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hjepa.distributed.process_group import all_gather_with_grad


def synchronize_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Let the batch norms below a module compute their statistics over all processes; parameters and buffers stay."""
    if device.type != "cpu":
        hooks = {name: norm._forward_hooks for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
        convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # its new modules have no hooks
        for name in hooks:
            module.get_submodule(name)._forward_hooks = hooks[name]
        return
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.__class__ = CPUSyncBatchNormAct if isinstance(norm, BatchNormAct2d) else CPUSyncBatchNorm


class CPUSyncBatchNorm(_BatchNorm):
    """A batch norm over all processes, which hold equal numbers of images."""

    weight: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, D, ...]; in training with the statistics of the images of all processes."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        mean = mean_over_processes(x.float().mean(dims))
        centered = x - mean.view(shape)
        variance = mean_over_processes(centered.square().mean(dims))
        self.update_statistics(mean.detach(), variance.detach(), dist.get_world_size() * x.numel() // x.shape[1])
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centered * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running mean and the running unbiased variance towards those of a batch with `count` values per channel."""
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


class CPUSyncBatchNormAct(CPUSyncBatchNorm):
    """The same, and the activation function that follows a batch norm in many networks of timm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, D, H, W], and apply the activation function."""
        activated: Tensor = self.act(self.drop(super().forward(x)))
        return activated


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; gradients flow back to every process."""
    return all_gather_with_grad(values.unsqueeze(0)).mean(0)
