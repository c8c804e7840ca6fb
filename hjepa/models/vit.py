"""The plain vision transformer: a timm `VisionTransformer` that can encode any subset of its patches.

The student encodes the context patches only, so that dropped patches cost nothing; the teacher and the probes encode all
patches. The state dict is the one of timm, so that `timm.create_model` loads an exported encoder.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.types import Fraction, PositiveFloat, PositiveInt
from hjepa.models.conv_stem import conv_arguments, mask_images, stem_arguments
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.layers import LeanMlp, gather_tokens, grid_centers, init_xavier, patchify, positions_on, sincos_positions
from hjepa.models.maps import check_patch_size


class ViTEncoder(Encoder, VisionTransformer):
    """A ViT over square images without a class token; its layers are its blocks.

    Args:
        image_size: Side of the images in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        dim: Token width, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Number of attention heads.
        mlp_ratio: Width of the hidden layer of the MLPs, relative to `dim`.
        num_summary_tokens: Number of learned tokens that accompany every subset of patches (register tokens in timm).
        positions: Position embeddings: "sincos" (fixed, two-dimensional) or "learned".
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of LayerScale; None uses no LayerScale.
        stem: Patch embedding: "patch" (a linear map of every patch) or "conv" (see `hjepa.models.conv_stem`).
    """

    layer_name = "block"
    pos_embed: nn.Parameter  # timm also allows None

    def __init__(
        self,
        image_size: PositiveInt,
        patch_size: PositiveInt,
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        mlp_ratio: PositiveFloat = 4.0,
        num_summary_tokens: int = 0,
        positions: Literal["sincos", "learned"] = "sincos",
        drop_path: Fraction = 0.0,
        layer_scale: float | None = None,
        stem: Literal["patch", "conv"] = "patch",
    ) -> None:
        check_patch_size(image_size, patch_size)
        if dim % heads or dim % 4:
            raise UserError(f"model.encoder.dim={dim} must be a multiple of 4 and of heads={heads}; change either of them.")
        architecture: dict[str, Any] = {
            "img_size": image_size,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio,
            "init_values": layer_scale,
            "class_token": False,
            "reg_tokens": num_summary_tokens,
            "no_embed_class": True,
            "global_pool": "avg",
            "fc_norm": False,
            "num_classes": 0,
        }
        super().__init__(**architecture, **stem_arguments(stem, patch_size, dim), drop_path_rate=drop_path, mlp_layer=LeanMlp)
        self.architecture = architecture
        self.image_size, self.patch_size, self.stem = image_size, patch_size, stem
        self.layer_dims, self.num_summary_tokens = (dim,) * depth, num_summary_tokens
        self.apply(init_xavier)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)  # with the 1e-6 of timm, the summary tokens stay alike for a long time
        if positions == "sincos":
            self.pos_embed.data.copy_(sincos_positions(grid_centers(self.grid), dim))
            self.pos_embed.requires_grad_(False)

    def forward(  # type: ignore[override]  # the one of timm classifies
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None = None, layers: Sequence[int] | None = None
    ) -> list[Stage]:
        """Return the hidden states after the given blocks, the last one after the final norm; see `Encoder.forward`."""
        numbers, grid = tuple(layers or (self.num_layers,)), images.shape[-1] // self.patch_size
        stages = []
        x = self.embed(images, keep)
        for number, block in enumerate(self.blocks[: max(numbers)], start=1):
            x = block(x)
            if number in numbers:
                tokens = self.norm(x) if number == self.num_layers else x
                stages.append(Stage(tokens, grid, self.num_summary_tokens))
        return stages

    def embed(self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None) -> Float[Tensor, "m n d"]:
        """Embed all patches ([B, S+N, D]) or the kept ones only ([B*C, S+K, D]), after the summary tokens."""
        positions = self.positions(images.shape[-1] // self.patch_size)
        if keep is not None:
            positions = positions[keep.flatten(0, 1)]
        tokens = (self.project_patches if self.stem == "patch" else self.convolve)(images, keep) + positions
        if self.reg_token is not None:
            tokens = torch.cat([self.reg_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens

    def project_patches(self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None) -> Float[Tensor, "m n d"]:
        """Map all patches, or the kept ones only, linearly to tokens."""
        patches, projection = patchify(images, self.patch_size), self.patch_embed.proj
        if keep is not None:
            patches = gather_tokens(patches, keep).flatten(0, 1)
        return F.linear(patches, projection.weight.flatten(1), projection.bias)

    def convolve(self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None) -> Float[Tensor, "m n d"]:
        """Apply the convolutional stem; return its output at all patches, or at the kept ones with the other pixels set to 0."""
        if keep is not None:
            images = mask_images(images, keep, self.patch_size).flatten(0, 1)
        tokens = self.patch_embed.backbone(images).flatten(2).transpose(1, 2)
        return tokens if keep is None else gather_tokens(tokens, keep.flatten(0, 1))

    def positions(self, grid: int) -> Float[Tensor, "n d"]:
        """Return the position embeddings of a grid, resampled unless the grid is the encoder's own."""
        return positions_on(self.pos_embed, grid)

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of every parameter as in BEiT (Bao et al. 2022); summary tokens belong to the embeddings."""
        ids = {name: 0 for name, _ in self.named_parameters()}
        for i, block in enumerate(self.blocks):
            ids |= {f"blocks.{i}.{name}": i + 1 for name, _ in block.named_parameters()}
        return ids | {f"norm.{name}": self.num_layers + 1 for name, _ in self.norm.named_parameters()}

    def adapt_state_dict(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of timm: drop the head, and resample positions and patch embedding if necessary.

        Class token and register tokens become the summary tokens if there are as many, in which case this encoder computes the
        same as the other network. Otherwise the class token is dropped. Summary tokens that the state dict lacks are those of
        this encoder.
        """
        weights = {name: value for name, value in weights.items() if not name.startswith(("head.", "fc_norm.", "mask_token"))}
        class_token, positions = weights.pop("cls_token", None), weights.get("pos_embed")
        if positions is not None and math.isqrt(count := positions.shape[1]) ** 2 == count - 1:
            weights["pos_embed"] = positions[:, 1:]
            class_token = None if class_token is None else class_token + positions[:, :1]
        if "register_tokens" in weights:
            weights["reg_token"] = weights.pop("register_tokens")
        if "pos_embed" in weights and "patch_embed.proj.weight" in weights:
            weights = checkpoint_filter_fn(weights, self)
        if class_token is not None and self.takes_class_token(weights):
            weights["reg_token"] = torch.cat([class_token, *([weights["reg_token"]] if "reg_token" in weights else [])], dim=1)
        own = {} if self.reg_token is None else {"reg_token": self.reg_token.detach()}
        return own | weights

    def takes_class_token(self, weights: dict[str, Tensor]) -> bool:
        """Return whether the summary tokens are as many as the register tokens of a state dict and a class token together."""
        registers = next((weights[name].shape[1] for name in ("reg_token", "register_tokens") if name in weights), 0)
        return self.num_summary_tokens == registers + 1

    def unused_names(self, weights: dict[str, Tensor], adapted: dict[str, Tensor]) -> list[str]:
        used = ("cls_token", "reg_token", "register_tokens") if self.takes_class_token(weights) else ()
        return [name for name in super().unused_names(weights, adapted) if name not in used]

    def attention_blocks(self, layer: int) -> list[nn.Module]:
        return list(self.blocks[:layer])

    def export_spec(self) -> dict[str, Any]:
        """Return the arguments of `timm.create_model`; `embed_layer` stands for the arguments of `conv_stem.conv_embed`."""
        stem: dict[str, Any] = {"patch_size": self.patch_size}
        if self.stem == "conv":
            stem = {"patch_size": 1, "embed_layer": conv_arguments(self.patch_size, self.layer_dims[-1])}
        # The arguments override the architecture of the named model, a plain ViT.
        return {"model_name": "vit_base_patch16_224", **stem, **self.architecture}
