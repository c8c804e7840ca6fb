"""The stem: what makes a token of every patch. timm's own modules, so that timm loads them."""

from functools import partial
from typing import Any

import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.norm import GroupNorm1
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from hjepa.config.errors import UserError


def stem_arguments(stem: str, patch_size: int, dim: int) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer that give it a stem."""
    if stem == "patch":
        return {"patch_size": patch_size}
    return {"patch_size": 1, "embed_layer": conv_embed(**conv_arguments(patch_size, dim))}  # a token for each of its outputs


def conv_arguments(patch_size: int, dim: int) -> dict[str, Any]:
    """The convolutions, after Xiao et al. 2021 ("Early Convolutions Help Transformers See Better"): of 3x3 pixels, the first at
    full resolution, each other halving the image and doubling the channels until there is one position for each patch; then
    a linear map to `dim` channels.
    """
    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings or halvings < 1 or dim % 2**halvings:
        raise UserError(
            f"model.encoder.stem=conv halves the image until a patch is one position: model.patch_size={patch_size} must be a "
            f"power of two, and model.encoder.dim={dim} a multiple of it; change these, or use model.encoder.stem=patch."
        )
    return {
        "depth": halvings + 2,
        "channels": [*(dim // 2 ** (halvings - i) for i in range(halvings + 1)), dim],
        "kernel_size": [*[3] * (halvings + 1), 1],
        "stride": [1, *[2] * halvings, 1],
    }


def conv_embed(depth: int, channels: list[int], kernel_size: list[int], stride: list[int]) -> Any:
    """timm's `embed_layer` of such convolutions, with GELU and, where Xiao et al. have batch norms, one group norm over each
    image: the student's images are full of holes, and the teacher has no statistics of its own.
    """
    convs = ConvStem(3, depth, tuple(channels), tuple(kernel_size), tuple(stride), norm_layer=GroupNorm1, act_layer=nn.GELU)
    return partial(HybridEmbed, backbone=convs, proj=False)


def mask_images(images: Tensor, keep: Tensor, patch_size: int) -> Tensor:
    """images [B, 3, S, S] as seen through each context, keep int64 [B, C, K] -> [B, C, 3, S, S], zero beyond the kept patches."""
    grid = images.shape[-1] // patch_size
    seen = torch.zeros(*keep.shape[:2], grid**2, dtype=images.dtype, device=images.device).scatter_(2, keep, 1)
    pixels = seen.unflatten(2, (1, grid, grid)).repeat_interleave(patch_size, -1).repeat_interleave(patch_size, -2)
    return images.unsqueeze(1) * pixels
