"""Hiera: a hierarchical vision transformer that computes nothing for dropped patches.

Its tokens are kept in the order of timm's `Hiera`: the position inside a patch varies most slowly, from the finest bit of the
row and the column to the coarsest, and the number of the patch varies fastest. Pooling 2 x 2 cells is a maximum over the first
quarter of the axis, and any subset of the patches can be encoded.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.hiera import Hiera, MaskUnitAttention, checkpoint_filter_fn
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.types import Fraction, PositiveFloat, PositiveInt
from hjepa.models.conv_stem import mask_images
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.layers import grid_centers, init_xavier, positions_on, sincos_positions
from hjepa.models.maps import check_patch_size, stem_kernel, stem_stride


class HieraEncoder(Encoder, Hiera):
    """Hiera (Ryali et al. 2023); the layers of the encoder are its stages.

    Every stage after the first one halves the resolution by max-pooling and doubles the width and the number of heads. A patch
    is a mask unit of the paper, which the last stage represents by one token. Attention stays inside the patches in all stages
    but the last two, where it is global. The final norm, which timm applies to pooled tokens, normalizes every token of the last
    stage, as in the pretraining of the paper.

    Args:
        image_size: Side of the images in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels: the stride of the patch embedding times 2 to the power of the stages but one. The
            published models have a stride of 4 and four stages, and therefore a patch size of 32.
        dim: Token width of the first stage, a multiple of 4 and of `heads`.
        stages: Number of blocks of every stage; 2 to 4 stages.
        heads: Number of attention heads of the first stage.
        mlp_ratio: Width of the hidden layer of the MLPs, relative to that of the tokens.
        positions: Position embeddings: "sincos" (fixed, two-dimensional) or "learned".
        drop_path: Rate of stochastic depth.
        num_summary_tokens: Not used; the encoder has no summary tokens.
    """

    pos_embed: nn.Parameter  # timm also allows None

    def __init__(
        self,
        image_size: PositiveInt,
        patch_size: PositiveInt,
        dim: PositiveInt,
        stages: list[PositiveInt],
        heads: PositiveInt = 1,
        mlp_ratio: PositiveFloat = 4.0,
        positions: Literal["sincos", "learned"] = "sincos",
        drop_path: Fraction = 0.0,
        num_summary_tokens: int = 0,
    ) -> None:
        if not 2 <= len(stages) <= 4:
            raise UserError(f"model.encoder.stages={list(stages)}: expected the numbers of blocks of 2 to 4 stages.")
        if dim % heads or dim % 4:
            raise UserError(f"model.encoder.dim={dim} must be a multiple of 4 and of heads={heads}; change either of them.")
        num_pools = len(stages) - 1
        check_patch_size(image_size, patch_size, num_pools)
        stride = stem_stride(patch_size, num_pools)
        kernel = stem_kernel(stride)
        architecture: dict[str, Any] = {
            "img_size": image_size,
            "embed_dim": dim,
            "stages": list(stages),
            "num_heads": heads,
            "mlp_ratio": mlp_ratio,
            "q_pool": num_pools,
            "mask_unit_size": [2**num_pools] * 2,
            "mask_unit_attn": [number < len(stages) - 1 for number in range(1, len(stages) + 1)],
            "patch_kernel": [kernel] * 2,
            "patch_stride": [stride] * 2,
            "patch_padding": [kernel // 2] * 2,
            "num_classes": 0,
        }
        super().__init__(**architecture, drop_path_rate=drop_path)
        self.architecture = architecture
        self.image_size, self.patch_size, self.num_summary_tokens = image_size, patch_size, 0
        self.layer_dims = tuple(dim * 2**i for i in range(len(stages)))
        for module in self.modules():
            # The fused kernels take no windows, so that plain products are faster; they can also be exported to ONNX.
            if isinstance(module, MaskUnitAttention) and module.use_mask_unit_attn:
                module.fused_attn = False
        self.apply(init_xavier)
        self.fix_init_weight()  # type: ignore[no-untyped-call]
        if positions == "sincos":
            self.pos_embed.data.copy_(sincos_positions(grid_centers(image_size // stride), dim))
            self.pos_embed.requires_grad_(False)

    def forward(  # type: ignore[override]  # the one of timm classifies
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None = None, layers: Sequence[int] | None = None
    ) -> list[Stage]:
        """Return the tokens after the given stages, the last ones after the final norm; see `Encoder.forward`."""
        numbers, grid = tuple(layers or (self.num_layers,)), images.shape[-1] // self.patch_size
        stages = []
        x = self.embed(images, keep)
        ends = {block: number for number, block in enumerate(self.stage_ends, start=1)}
        for i, block in enumerate(self.blocks[: self.stage_ends[max(numbers) - 1] + 1]):
            x = block(x)
            if ends.get(i) in numbers:
                num_halvings = self.num_layers - ends[i]
                tokens = self.head.norm(x) if ends[i] == self.num_layers else x
                tokens = reroll(tokens, num_halvings, grid if keep is None else None)
                stages.append(Stage(tokens, grid * 2**num_halvings, 0))
        return stages

    def embed(self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None) -> Float[Tensor, "m n d"]:
        """Embed all patches, or the kept ones from images in which the others are set to 0; tokens are in timm's order."""
        if keep is not None:
            images = mask_images(images, keep, self.patch_size).flatten(0, 1)
        x = self.patch_embed.proj(images)
        x = x + self.positions(x.shape[-1]).T.unflatten(1, x.shape[2:])
        tokens = unroll(x, self.num_layers - 1)
        if keep is not None:
            tokens = torch.take_along_dim(tokens, keep.flatten(0, 1)[:, None, :, None], dim=2)
        return tokens.flatten(1, 2)

    def positions(self, side: int) -> Float[Tensor, "n d"]:
        """Return the position embeddings of `side` x `side` tokens, resampled unless these are the encoder's own."""
        return positions_on(self.pos_embed, side)

    @property
    def layer_grids(self) -> tuple[int, ...]:
        return tuple(self.grid * 2 ** (self.num_layers - layer) for layer in range(1, self.num_layers + 1))

    def layer_ids(self) -> dict[str, int]:
        """Return 0 for the embeddings, the number of its stage for a block, and `num_layers` + 1 for the final norm."""
        ids = {name: 0 for name, _ in self.named_parameters()}
        for i, block in enumerate(self.blocks):
            stage = 1 + sum(i > end for end in self.stage_ends)
            ids |= {f"blocks.{i}.{name}": stage for name, _ in block.named_parameters()}
        return ids | {f"head.norm.{name}": self.num_layers + 1 for name, _ in self.head.norm.named_parameters()}

    def adapt_state_dict(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of timm or of the authors: drop the classifier, and resample positions if necessary."""
        weights = checkpoint_filter_fn(weights)  # type: ignore[no-untyped-call]
        weights = {name: value for name, value in weights.items() if not name.startswith(("head.fc.", "decoder", "mask_token"))}
        positions = weights.get("pos_embed")
        if positions is not None and positions.shape[1] != self.pos_embed.shape[1]:
            side = self.tokens_spatial_shape[0]
            weights["pos_embed"] = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=0)
        return weights

    def export_spec(self) -> dict[str, Any]:
        # The arguments override the architecture of the named model.
        return {"model_name": "hiera_tiny_224", **self.architecture}


def unroll(x: Float[Tensor, "m d h w"], num_halvings: int) -> Float[Tensor, "m c n d"]:
    """Bring a map into timm's order: the cells inside a patch, the finest bits first, and the patches in raster order.

    Args:
        x: A map.
        num_halvings: Number of times that the side of a patch can be halved until it is one cell.
    """
    bits = [2] * num_halvings
    axes = x.unflatten(3, (-1, *bits)).unflatten(2, (-1, *bits))  # row of the patch, its bits from coarse to fine; columns
    rows, columns = 2, 3 + num_halvings
    finest_first = [axis + bit for bit in range(num_halvings, 0, -1) for axis in (rows, columns)]
    return axes.permute(0, *finest_first, rows, columns, 1).flatten(1 + 2 * num_halvings, -2).flatten(1, -3)


def reroll(tokens: Float[Tensor, "m n d"], num_halvings: int, grid: int | None) -> Float[Tensor, "m n d"]:
    """Return tokens from timm's order to that of `Encoder.forward`.

    Args:
        tokens: Tokens in the order of `unroll`.
        num_halvings: Number of times that the side of a patch can still be halved.
        grid: Side of the grid of patches for raster order over the complete image; None lets the cells of a patch follow one
            another.
    """
    patches = (-1,) if grid is None else (grid, grid)
    axes = tokens.unflatten(1, (*[2] * (2 * num_halvings), *patches))
    rows = [1 + 2 * bit for bit in reversed(range(num_halvings))]  # from coarse to fine
    columns = [axis + 1 for axis in rows]
    first = 1 + 2 * num_halvings
    order = [first, *rows, *columns] if grid is None else [first, *rows, first + 1, *columns]
    return axes.permute(0, *order, -1).flatten(1, -2)
