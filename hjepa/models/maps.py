"""Maps [M, D, H, W] of hierarchical encoders: their masks, and their tokens in the order of `hjepa.models.encoder.Encoder`.

Patches are kept or dropped as a whole. In a map whose grid is r times finer than that of the patches, a patch has r x r cells.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.masking.geometry import cells_to_patches
from hjepa.models.layers import gather_tokens


def check_patch_size(image_size: int, patch_size: int, num_halvings: int | None = None) -> None:
    """Raise `UserError` if a patch size does not divide the image size.

    Args:
        image_size: Side of the images.
        patch_size: Side of a patch.
        num_halvings: How often the stages of the encoder halve the resolution. The error then suggests patch sizes that
            `stem_stride` accepts.
    """
    if image_size % patch_size:
        sizes = range(2, image_size) if num_halvings is None else [2**n for n in range(num_halvings, image_size.bit_length())]
        divisors = [size for size in sizes if image_size % size == 0]
        remedy = f"use one of {divisors} or another image size" if divisors else "use another image size"
        raise UserError(f"model.patch_size={patch_size} does not divide dataset.image_size={image_size}; {remedy}.")


def stem_stride(patch_size: int, num_halvings: int) -> int:
    """Return the stride of a stem after which `num_halvings` halvings of the resolution lead to one cell per patch.

    Raises:
        UserError: If the stride would be no power of two, or less than 1.
    """
    stride, remainder = divmod(patch_size, 2**num_halvings)
    if remainder or stride < 1 or stride & (stride - 1):
        examples = [2**num_halvings * 2**i for i in range(3)]
        raise UserError(
            f"model.patch_size={patch_size}: the stages of the encoder halve the resolution {num_halvings} times after a stem "
            f"whose stride is a power of two; use a patch size such as {examples}, or another number of stages."
        )
    return stride


def stem_kernel(stride: int) -> int:
    """Return the kernel size of a stem whose windows overlap: 3 for a stride of 1 or 2, 7 for a stride of 4."""
    return max(3, 2 * stride - 1)


def cell_index(keep: Int[Tensor, "m k"] | None, grid: int, ratio: int) -> Int[Tensor, "m n"] | None:
    """Return the raster indices of the cells of patches, in a grid that is `ratio` times finer.

    Args:
        keep: Indices of K patches, or None.
        grid: Side of the grid of patches.
        ratio: Side of a patch in cells.

    Returns:
        Indices [M, K * ratio^2]. The cells of a patch follow one another in raster order. None if `keep` is None.
    """
    if keep is None:
        return None
    return cells_to_patches(keep, grid * ratio, ratio)


def map_tokens(x: Float[Tensor, "m d h w"], index: Int[Tensor, "m n"] | None) -> Float[Tensor, "m _ d"]:
    """Return the tokens of the given cells, or those of all cells in raster order (a view of a map in channels-last format)."""
    tokens = x.flatten(2).mT
    return tokens if index is None else gather_tokens(tokens, index)


def apply_to_cells(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "m d h w"], index: Int[Tensor, "m n"] | None
) -> Float[Tensor, "m d h w"]:
    """Apply a function to the given cells of a map and set all other cells to 0.

    The function sees nothing of the other cells, so that a normalization computes its statistics over the given cells only.

    Args:
        function: Function that keeps the shape of its input and treats all cells alike, such as a norm or an activation function.
        x: The map, for speed in channels-last format.
        index: Raster indices of N cells; None applies the function to the complete map.
    """
    if index is None:
        return function(x)
    m, d, h, w = x.shape
    rows = (index + h * w * torch.arange(m, device=index.device).unsqueeze(1)).flatten()
    cells = x.permute(0, 2, 3, 1).reshape(-1, d).index_select(0, rows)
    cells = function(cells.view(m, -1, 1, d).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(-1, d)
    return cells.new_zeros(m * h * w, d).index_copy(0, rows, cells).view(m, h, w, d).permute(0, 3, 1, 2)
