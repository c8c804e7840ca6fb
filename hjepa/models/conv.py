"""A small convolutional network with stages, for small images and processors without an accelerator."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.norm import GroupNorm1
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.types import NonNegativeInt, PositiveInt
from hjepa.models.conv_stem import mask_images
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.maps import apply_to_cells, cell_index, check_patch_size, map_tokens, stem_kernel, stem_stride

NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "group": GroupNorm1}


class ConvEncoder(Encoder):
    """Convolutional stages, each of which halves the resolution; the layers of the encoder are its stages.

    A stage is a 3x3 convolution, 2x2 max-pooling, a norm and GELU, followed by residual blocks x + GELU(norm(conv3x3(x))). The
    stem is a 3x3 convolution, a norm and GELU at full resolution, or a strided convolution if the patches are larger than the
    stages make them.

    Where patches are masked, the encoder computes a sparse convolution (SparK, Tian et al. 2023): hidden pixels, and hidden
    cells after the stem, after every stage and after every residual block, are set to 0. Nothing leaks into a hidden cell, and
    the mask of every stage has the shape of the kept patches. Norms compute their statistics over the visible cells only. A
    masked image costs as much as a complete one, because the convolutions run over the hidden cells too.

    Args:
        image_size: Side of the images in pixels, a multiple of `patch_size`.
        patch_size: Side of a cell of the last stage in pixels: the stride of the stem times 2 to the power of the stages.
        stem: Number of channels of the stem.
        dims: Number of channels of every stage.
        residuals: Number of residual blocks of every stage.
        norm: "batch" (batch norm) or "group" (every image by itself: group norm with one group).
        num_summary_tokens: Not used; the encoder has no summary tokens.
    """

    def __init__(
        self,
        image_size: PositiveInt,
        patch_size: PositiveInt,
        stem: PositiveInt,
        dims: list[PositiveInt],
        residuals: list[NonNegativeInt],
        norm: Literal["batch", "group"] = "batch",
        num_summary_tokens: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < len(dims) == len(residuals):
            raise UserError(
                f"model.encoder.dims={list(dims)} and model.encoder.residuals={list(residuals)} need one entry per stage each."
            )
        check_patch_size(image_size, patch_size, len(dims))
        self.image_size, self.patch_size, self.num_summary_tokens = image_size, patch_size, 0
        self.layer_dims = tuple(dims)
        stride = stem_stride(patch_size, len(dims))
        self.stem = ConvUnit(3, stem, norm, stride=stride)
        stages = zip(pairwise([stem, *dims]), residuals, strict=True)
        self.blocks = nn.ModuleList(ConvStage(before, dim, count, norm) for (before, dim), count in stages)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None = None, layers: Sequence[int] | None = None
    ) -> list[Stage]:
        """Return the tokens after the given stages; see `Encoder.forward`."""
        numbers, grid = tuple(layers or (self.num_layers,)), images.shape[-1] // self.patch_size
        kept = None
        if keep is not None:
            images, kept = mask_images(images, keep, self.patch_size).flatten(0, 1), keep.flatten(0, 1)
        stages, ratio = [], 2**self.num_layers
        x = self.stem(images.contiguous(memory_format=torch.channels_last), cell_index(kept, grid, ratio))
        for number, block in enumerate(self.blocks[: max(numbers)], start=1):
            ratio //= 2
            index = cell_index(kept, grid, ratio)
            x = block(x, index)
            if number in numbers:
                stages.append(Stage(map_tokens(x, index), grid * ratio, 0))
        return stages

    @property
    def layer_grids(self) -> tuple[int, ...]:
        return tuple(self.grid * 2 ** (self.num_layers - layer) for layer in range(1, self.num_layers + 1))

    def layer_ids(self) -> dict[str, int]:
        """Return 0 for the stem, and the number of its stage for every other parameter."""
        return {name: 0 if name.startswith("stem.") else int(name.split(".")[1]) + 1 for name, _ in self.named_parameters()}


class SmallMapConv2d(nn.Conv2d):
    """A convolution without bias; on small maps, a 3x3 convolution with stride 1 is computed as one matrix product.

    The result is the same. On a CPU, and where the input has at most 3x3 cells, as the last stage has for local crops, the matrix
    product takes as little as half of the time (measured on an AMD EPYC without AVX-512).
    """

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m d _ _"]:
        """Return the convolution of x."""
        small = x.device.type == "cpu" and max(x.shape[-2:]) <= 3
        if not small or self.kernel_size != (3, 3) or self.stride != (1, 1):
            return super().forward(x)
        height, width = x.shape[-2:]
        cells = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        neighbors = torch.cat([cells[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], dim=-1)
        return (neighbors @ self.weight.permute(2, 3, 1, 0).flatten(0, 2)).permute(0, 3, 1, 2)


class ConvUnit(nn.Module):
    """A convolution without bias, optional 2x2 max-pooling, a norm and GELU.

    Args:
        dim: Number of input channels.
        out: Number of output channels.
        norm: Key of `NORMS`.
        stride: Stride of the convolution.
        pool: Whether to halve the resolution after the convolution.
    """

    def __init__(self, dim: int, out: int, norm: str, stride: int = 1, pool: bool = False) -> None:
        super().__init__()
        kernel = stem_kernel(stride)
        self.conv = SmallMapConv2d(dim, out, kernel, stride, kernel // 2, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm, self.act = NORMS[norm](out), nn.GELU()

    def forward(self, x: Float[Tensor, "m _ h w"], index: Int[Tensor, "m n"] | None = None) -> Float[Tensor, "m d _ _"]:
        """Return the output at the cells with the given raster indices and 0 at all others, or the complete output."""
        return apply_to_cells(self.normalize, self.pool(self.conv(x)), index)

    def normalize(self, x: Float[Tensor, "m d h w"]) -> Float[Tensor, "m d h w"]:
        """Apply the norm and the activation function."""
        return self.act(self.norm(x))


class ConvStage(nn.Module):
    """A unit that halves the resolution, and residual blocks.

    Args:
        dim: Number of input channels.
        out: Number of output channels.
        num_residuals: Number of residual blocks.
        norm: Key of `NORMS`.
    """

    def __init__(self, dim: int, out: int, num_residuals: int, norm: str) -> None:
        super().__init__()
        self.down = ConvUnit(dim, out, norm, pool=True)
        self.residuals = nn.ModuleList(ConvUnit(out, out, norm) for _ in range(num_residuals))

    def forward(self, x: Float[Tensor, "m _ h w"], index: Int[Tensor, "m n"] | None = None) -> Float[Tensor, "m d _ _"]:
        """Return the output at the cells with the given raster indices and 0 at all others, or the complete output."""
        x = self.down(x, index)
        for residual in self.residuals:
            x = x + residual(x, index)
        return x
