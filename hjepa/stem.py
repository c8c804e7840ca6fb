"""The stem: what makes a token of every patch. timm's own modules, so that timm loads them."""

from functools import partial
from typing import Any

import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from hjepa.errors import UserError


def embedding(stem: str, patch_size: int, dim: int) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer that give it a stem."""
    if stem == "patch":
        return {"patch_size": patch_size}
    return {"patch_size": 1, "embed_layer": conv_embed(**convolutions(patch_size, dim))}  # a token for each of its outputs


def convolutions(patch_size: int, dim: int) -> dict[str, Any]:
    """The convolutions of Xiao et al. 2021 ("Early Convolutions Help Transformers See Better"): of 3x3 pixels, each halves the
    image and doubles the channels, until there is one position for each patch; then a linear map to `dim` channels.
    """
    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings or halvings < 1 or dim % 2**halvings:
        raise UserError(
            f"model.encoder.stem=conv halves the image until a patch is one position: model.patch_size={patch_size} must be a "
            f"power of two, and model.encoder.dim={dim} a multiple of it; change these, or use model.encoder.stem=patch."
        )
    return {
        "depth": halvings + 1,
        "channels": [*(dim // 2 ** (halvings - i) for i in range(halvings)), dim],
        "kernel_size": [*[3] * halvings, 1],
        "stride": [*[2] * halvings, 1],
    }


def conv_embed(depth: int, channels: list[int], kernel_size: list[int], stride: list[int]) -> Any:
    """timm's `embed_layer` of such convolutions, with GELU and, as the student's images are full of holes, layer norms where
    Xiao et al. have batch norms.
    """
    convs = ConvStem(3, depth, tuple(channels), tuple(kernel_size), tuple(stride), norm_layer=LayerNorm2d, act_layer=nn.GELU)
    return partial(HybridEmbed, backbone=convs, proj=False)


def hide(images: Tensor, keep: Tensor, patch_size: int) -> Tensor:
    """images [B, 3, S, S] as seen through each context, keep int64 [B, C, K] -> [B, C, 3, S, S], zero beyond the kept patches."""
    grid = images.shape[-1] // patch_size
    seen = torch.zeros(*keep.shape[:2], grid**2, dtype=images.dtype, device=images.device).scatter_(2, keep, 1)
    pixels = seen.unflatten(2, (1, grid, grid)).repeat_interleave(patch_size, -1).repeat_interleave(patch_size, -2)
    return images.unsqueeze(1) * pixels
