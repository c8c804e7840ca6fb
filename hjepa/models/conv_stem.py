"""Patch embeddings of the ViT: a linear map, or a convolutional stem. Built from modules of timm, so that timm loads them."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.norm import GroupNorm1
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from hjepa.config.errors import UserError


def stem_arguments(stem: str, patch_size: int, dim: int) -> dict[str, Any]:
    """Return the arguments of timm's `VisionTransformer` that select a patch embedding."""
    if stem == "patch":
        return {"patch_size": patch_size}
    # For timm, every output position of the convolutions is a patch of one pixel.
    return {"patch_size": 1, "embed_layer": conv_embed(**conv_arguments(patch_size, dim))}


def conv_arguments(patch_size: int, dim: int) -> dict[str, Any]:
    """Return the arguments of `conv_embed` for a patch size and a token width.

    The stem follows Xiao et al. 2021 ("Early Convolutions Help Transformers See Better"): the first 3x3 convolution runs at full
    resolution; each further one halves the resolution and doubles the channels, until one position corresponds to one patch. A
    linear map to `dim` channels comes last.

    Raises:
        UserError: If the patch size is no power of two, or does not divide `dim`.
    """
    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings or halvings < 1 or dim % 2**halvings:
        raise UserError(
            f"model.encoder.stem=conv halves the resolution until a patch is one position: model.patch_size={patch_size} must be "
            f"a power of two, and model.encoder.dim={dim} a multiple of it; change these, or use model.encoder.stem=patch."
        )
    return {
        "depth": halvings + 2,
        "channels": [*(dim // 2 ** (halvings - i) for i in range(halvings + 1)), dim],
        "kernel_size": [*[3] * (halvings + 1), 1],
        "stride": [1, *[2] * halvings, 1],
    }


def conv_embed(depth: int, channels: list[int], kernel_size: list[int], stride: list[int]) -> Any:
    """Return a convolutional stem as timm's argument `embed_layer`.

    Where Xiao et al. use batch norm, this stem normalizes every image by itself (group norm with one group): large parts of the
    images of the student are masked, and the teacher has no batch statistics of its own.
    """
    convs = ConvStem(3, depth, tuple(channels), tuple(kernel_size), tuple(stride), norm_layer=GroupNorm1, act_layer=nn.GELU)
    return partial(HybridEmbed, backbone=convs, proj=False)


def mask_images(images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"], patch_size: int) -> Float[Tensor, "b c 3 h w"]:
    """Return a copy of every image for each of its contexts, with all pixels outside the kept patches set to 0."""
    grid = images.shape[-1] // patch_size
    visible = torch.zeros(*keep.shape[:2], grid**2, dtype=images.dtype, device=images.device).scatter_(2, keep, 1)
    pixels = visible.unflatten(2, (1, grid, grid)).repeat_interleave(patch_size, -1).repeat_interleave(patch_size, -2)
    return images.unsqueeze(1) * pixels
