"""Building blocks of the networks: positions, patches, MLP, cross-attention and projector."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.mlp import Mlp
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hjepa.config.types import PositiveInt


def grid_centers(grid: int) -> Float[Tensor, "n 2"]:
    """Return the centers (row, column) [grid^2, 2] of patches in raster order; a patch lies at its own index."""
    axis = torch.arange(grid, dtype=torch.float32)
    return torch.cartesian_prod(axis, axis)


def sincos_positions(points: Float[Tensor, "*shape 2"], dim: int) -> Float[Tensor, "*shape {dim}"]:
    """Return the sine-cosine embeddings of points (row, column) (MAE, He et al. 2022, A.1).

    The first half of the channels encodes the column and the second half the row, each as sines followed by cosines.
    """
    exponents = -torch.arange(dim // 4, dtype=torch.float32, device=points.device) / (dim / 4)
    angles = points.flip(-1).unsqueeze(-1) * 10000.0**exponents  # [..., 2, dim / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def positions_on(embeddings: Float[Tensor, "1 n d"], side: int) -> Float[Tensor, "m d"]:
    """Return position embeddings of a square grid for one of `side` x `side`, resampled unless it is the same."""
    if side**2 == embeddings.shape[1]:
        return embeddings[0]
    resampled: Tensor = resample_abs_pos_embed(embeddings, [side, side], num_prefix_tokens=0)
    return resampled[0]


def patchify(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n d"]:
    """Cut images into patches [B, N, C * patch_size^2] in raster order, each flattened as a convolution weight is."""
    b, c, h, w = images.shape
    p = patch_size
    patches = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p)


def gather_tokens(tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b ..."]) -> Float[Tensor, "b ... d"]:
    """Select tokens by indices of any shape [B, ...]."""
    flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, flat).unflatten(1, index.shape[1:])


def init_xavier(module: nn.Module) -> None:
    """Initialize a linear or convolutional module as MAE does (He et al. 2022).

    With the standard deviation of 0.02 that timm uses, positions outweigh patches in narrow networks, and the targets of an
    untrained teacher would encode little more than the location of a patch.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class LeanMlp(Mlp):
    """The MLP of timm with less activation memory: its backward pass recomputes the output of the activation function.

    This saves a fifth of the activation memory of a transformer block at no measurable cost in time.
    """

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        hidden: Tensor = self.fc1(x)
        if not torch.is_grad_enabled():
            return self.project(hidden)
        return checkpoint(self.project, hidden, use_reentrant=False, preserve_rng_state=False)

    def project(self, hidden: Float[Tensor, "*b h"]) -> Float[Tensor, "*b d"]:
        """Apply the activation function and the second linear map."""
        return self.fc2(self.act(hidden))


class CrossBlock(nn.Module):
    """A transformer block in which queries attend to a context and leave it unchanged.

    Args:
        dim: Token width, a multiple of `heads`.
        heads: Number of attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm_context, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = LeanMlp(dim, 4 * dim)

    def forward(self, queries: Float[Tensor, "m t d"], context: Float[Tensor, "m k d"]) -> Float[Tensor, "m t d"]:
        """Return the updated queries."""
        q = self.q(self.norm1(queries)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_context(context)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries = queries + self.proj(attended)
        mixed: Tensor = self.mlp(self.norm2(queries))
        return queries + mixed


class Projector(nn.Sequential):
    """An MLP between the pooled features, which the probes use, and the features that the regularizer uses.

    Linear, batch norm and ReLU `layers - 1` times, then a linear map (SimCLR, Chen et al. 2020; the expander of VICReg,
    Bardes et al. 2022): [M, dim] -> [M, out].

    Args:
        dim: Width of the input.
        hidden: Width of the hidden layers.
        out: Width of the output.
        layers: Number of linear maps.
    """

    def __init__(self, dim: int, hidden: PositiveInt, out: PositiveInt, layers: PositiveInt) -> None:
        widths = [dim, *[hidden] * (layers - 1), out]
        modules: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            modules += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        super().__init__(*modules, nn.Linear(widths[-2], out))
