"""The encoder: a timm VisionTransformer that can encode any subset of its patches and hand out hidden states.

The student encodes only the context patches (dropped patches are never computed), the teacher and the probes encode all.
The state dict is timm's own, so `timm.create_model` loads an exported encoder.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.conv_stem import mask_images, stem_arguments
from hjepa.models.layers import LeanMlp, Recomputing, gather_tokens, grid_centers, init_xavier, patchify, sincos_positions


class ViTEncoder(Recomputing, VisionTransformer):
    """A ViT over square images without class token, with `summary_tokens` extra tokens (timm's register tokens).

    Args:
        image_size, patch_size: in pixels; the patch size divides the image size.
        dim, depth, heads, mlp_ratio: width, number of blocks, attention heads, MLP expansion.
        summary_tokens: learned tokens that travel with every subset of patches.
        positions: "sincos" (fixed, 2-D) or "learned".
        drop_path: stochastic depth rate; layer_scale: initial value of timm's LayerScale, None for none.
        stem: what makes tokens of patches: "patch", a linear map of each, or "conv", see `hjepa.models.conv_stem`.
    """

    pos_embed: nn.Parameter  # timm allows for none, we always have one

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        summary_tokens: int = 0,
        positions: str = "sincos",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        stem: Literal["patch", "conv"] = "patch",
    ) -> None:
        if image_size % patch_size:
            divisors = [p for p in range(2, image_size) if image_size % p == 0]
            raise UserError(
                f"model.patch_size={patch_size} does not divide dataset.image_size={image_size}; "
                f"use one of {divisors} or another image size."
            )
        if dim % heads or dim % 4:
            raise UserError(f"An encoder of dim={dim} needs a dim that 4 and heads={heads} divide; change either.")
        if positions not in ("sincos", "learned"):
            raise UserError(f"model.encoder.positions={positions} is unknown; expected sincos or learned.")
        super().__init__(
            img_size=image_size,
            **stem_arguments(stem, patch_size, dim),
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            class_token=False,
            reg_tokens=summary_tokens,
            no_embed_class=True,
            global_pool="avg",
            fc_norm=False,
            num_classes=0,
            drop_path_rate=drop_path,
            init_values=layer_scale,
            mlp_layer=LeanMlp,
        )
        self.image_size, self.patch_size = image_size, patch_size
        self.grid = image_size // patch_size
        self.depth, self.summary_tokens, self.stem = depth, summary_tokens, stem
        self.apply(init_xavier)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)  # timm's 1e-6 leaves all summary tokens the same for long
        if positions == "sincos":
            self.pos_embed.data.copy_(sincos_positions(grid_centers(self.grid), dim))
            self.pos_embed.requires_grad_(False)

    def embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Embed all patches ([B, S+N, D]) or only the kept ones ([B*C, S+K, D]), summary tokens first."""
        positions = self.positions(images.shape[-1] // self.patch_size)
        if keep is not None:
            positions = positions[keep.flatten(0, 1)]
        tokens = (self.map_patches if self.stem == "patch" else self.convolve)(images, keep) + positions
        if self.reg_token is not None:
            tokens = torch.cat([self.reg_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens

    def map_patches(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Every patch, or only the kept ones, linearly mapped."""
        patches, projection = patchify(images, self.patch_size), self.patch_embed.proj
        if keep is not None:
            patches = gather_tokens(patches, keep).flatten(0, 1)
        return F.linear(patches, projection.weight.flatten(1), projection.bias)

    def convolve(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """The convolutions' output at every patch, or only at the kept ones, where they see zeros in place of the others."""
        if keep is not None:
            images = mask_images(images, keep, self.patch_size).flatten(0, 1)
        tokens = self.patch_embed.backbone(images).flatten(2).transpose(1, 2)
        return tokens if keep is None else gather_tokens(tokens, keep.flatten(0, 1))

    def positions(self, grid: int) -> Tensor:
        """Position embeddings [grid^2, D]; for a grid other than the encoder's own they are resampled."""
        if grid == self.grid:
            return self.pos_embed[0]
        resampled: Tensor = resample_abs_pos_embed(self.pos_embed, [grid, grid], num_prefix_tokens=0)
        return resampled[0]

    def forward(  # type: ignore[override]  # timm's forward classifies; ours encodes
        self, images: Tensor, keep: Tensor | None = None, depths: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Hidden states after the given numbers of blocks (default: the last), the last one after the final norm.

        Args:
            images: float [B, 3, H, W], of any square size that the patch size divides (local crops are smaller).
            keep: int64 [B, C, K] patch indices, or None for all patches.
            depths: ascending block counts in 1..depth.

        Returns:
            One [B*C, S+K, D] per depth (C = 1 and K = N where `keep` is None), the S summary tokens first.
        """
        wanted = tuple(depths or (self.depth,))
        states: list[Tensor] = []
        x = self.embed(images, keep)
        for count, block in enumerate(self.blocks[: max(wanted)], start=1):
            x = self.run(block, x)
            if count in wanted:
                states.append(self.norm(x) if count == self.depth else x)
        return states

    @property
    def feature_dim(self) -> int:
        """Width of `pooled`."""
        return (2 if self.summary_tokens else 1) * self.embed_dim

    def features(self, images: Tensor) -> Tensor:
        """Image features of the probe protocol: `pooled` over all patches."""
        return self.pooled(self(images)[-1])

    def pooled(self, tokens: Tensor) -> Tensor:
        """[B, S+K, D] -> [B, D], or [B, 2D] with summary tokens: the mean patch token, then the mean summary token."""
        s = self.summary_tokens
        patches = tokens[:, s:].mean(1)
        return torch.cat([patches, tokens[:, :s].mean(1)], dim=1) if s else patches
