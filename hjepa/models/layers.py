"""Fixed 2-D sine-cosine positions, for patches and for the cells that a coarser level pools from them."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa.config.errors import UserError


def grid_centers(grid: int, pool: int = 1) -> Tensor:
    """Centers (row, column) in patch units of the cells of `pool` x `pool` patches, raster order: float [(grid/pool)^2, 2].

    A patch (pool 1) sits at its own index, so patches and cells share one coordinate system.
    """
    axis = torch.arange(grid // pool, dtype=torch.float32) * pool + (pool - 1) / 2
    return torch.cartesian_prod(axis, axis)


def sincos_positions(points: Tensor, dim: int) -> Tensor:
    """Embed points [T, 2] as [T, dim]: a half each for column and row, sines then cosines (MAE, He et al. 2022, A.1)."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    halves = [torch.outer(points[:, axis].double(), frequencies) for axis in (1, 0)]
    return torch.cat([f(angle) for angle in halves for f in (torch.sin, torch.cos)], dim=1).float()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3 * patch_size ** 2], patches in raster order, each in the layout of a conv weight."""
    b, c, h, w = images.shape
    p = patch_size
    patches = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D], index int64 [B, ..., K] -> [B, ..., K, D]."""
    flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, flat).unflatten(1, index.shape[1:])


def init_xavier(module: nn.Module) -> None:
    """MAE's initialization (He et al. 2022): at timm's std of 0.02 the positions drown the patches in narrow networks, and
    what an untrained teacher says of a patch is then little more than where it is.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class LeanMlp(Mlp):
    """timm's MLP, whose backward pass recomputes the activation's output instead of keeping it: a fifth less memory for the
    activations of a transformer block, at no measurable cost in time.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.fc1(x)
        if not torch.is_grad_enabled():
            return self.activate(hidden)
        return checkpoint(self.activate, hidden, use_reentrant=False, preserve_rng_state=False)

    def activate(self, hidden: Tensor) -> Tensor:
        """What follows the first linear map."""
        return self.fc2(self.act(hidden))


class CrossBlock(nn.Module):
    """A transformer block whose queries attend to a context that stays as it is.

    Args:
        dim, heads: width and attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm_context, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = LeanMlp(dim, 4 * dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries [M, T, dim] and context [M, K, dim] -> [M, T, dim]."""
        q = self.q(self.norm1(queries)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_context(context)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = queries + self.proj(attended)
        mixed: Tensor = self.mlp(self.norm2(queries))
        return queries + mixed


class Projector(nn.Sequential):
    """Linear, batch norm and ReLU `layers - 1` times, then a linear map (SimCLR, Chen et al. 2020; VICReg's expander):
    [M, dim] -> [M, out].

    Args:
        dim: width of its input; hidden, out: widths inside and of its output; layers: number of linear maps.
    """

    def __init__(self, dim: int, hidden: int, out: int, layers: int) -> None:
        if min(hidden, out, layers) < 1:
            raise UserError(f"projector.hidden={hidden}, out={out} and layers={layers} must be at least 1.")
        widths = [dim, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            modules += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        super().__init__(*modules, nn.Linear(widths[-2], out))


class Recomputing(nn.Module):
    """A part that can forget what its blocks computed, and compute it again in the backward pass.

    `checkpoint` calls a block and keeps none of its activations; None keeps them.
    """

    checkpoint: Callable[..., Tensor] | None = None

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """What the block makes of the inputs."""
        if self.checkpoint and torch.is_grad_enabled():
            return self.checkpoint(block, *inputs)
        output: Tensor = block(*inputs)
        return output
