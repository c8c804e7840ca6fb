"""Views: where a cell of one crop of an image lies in another crop.

A box is the affine map [2, 3] from the coordinates of a crop to those of its image, both from -1 to 1, as
`hjepa.data.augment.Augment.boxes` returns it: x' = width * x + center_x, y' = height * y + center_y, where the image has the
width 1, and a negative width stands for a mirrored crop. Points are (row, column) in the coordinates of a crop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from hjepa.models.levels import Level, cell_centers


class Queries(NamedTuple):
    """Target cells of one level, as seen from the contexts.

    Attributes:
        level: The level.
        places: Centers (row, column) of P x T target cells of each of C contexts, in the coordinates of the context's view.
        change: How the target's view differs from the context's: log of the relative height and width, and 1 if mirrored. None
            if it is the same view.
    """

    level: Level
    places: Float[Tensor, "b c p t 2"]
    change: Float[Tensor, "b c p 3"] | None = None


class Matches(NamedTuple):
    """The target cells of one level in other views, for the contexts that are global crops or for those that are local crops.

    Attributes:
        queries: The cells as seen from the contexts.
        order: For each target view, indices of the (context, target view) pairs that refer to it, in the flattened C x P axis.
        cell: Raster index of the target cell in its view.
        inside: True for cells whose center lies inside the context's view; the others have no counterpart there.
    """

    queries: Queries
    order: Int64[Tensor, "v n"]
    cell: Int64[Tensor, "b c p t"]
    inside: Bool[Tensor, "b c p t"]

    def by_target_view(self, values: Shaped[Tensor, "b c p t *d"]) -> Shaped[Tensor, "b v q *d"]:
        """Group the values of the queries by target view, each of which has Q of them."""
        return values.flatten(1, 2)[:, self.order].flatten(2, 3)


def target_views(num_views: int, num_contexts: int, local: bool, device: torch.device) -> Int64[Tensor, "c p"]:
    """Return the views that each context predicts.

    Args:
        num_views: Number V of global crops.
        num_contexts: Number of contexts of each global crop, or number of local crops.
        local: Whether the contexts are local crops, which predict all V global crops. Those of a global crop predict the V - 1
            others, in cyclic order.
        device: Device of the result.
    """
    views = torch.arange(num_views, device=device)
    if local:
        return views.expand(num_contexts, -1)
    others = (views.unsqueeze(1) + views[1:]) % num_views
    return others.repeat_interleave(num_contexts, dim=0)


def place_points(
    context: Float[Tensor, "b c p 2 3"], target: Float[Tensor, "b c p 2 3"], points: Float[Tensor, "n 2"]
) -> Float[Tensor, "b c p n 2"]:
    """Return points of target views in the coordinates of the context's view; those beyond -1 to 1 lie outside of it."""
    (scale, shift), (own_scale, own_shift) = split_box(target), split_box(context)
    return (points * scale.unsqueeze(3) + (shift - own_shift).unsqueeze(3)) / own_scale.unsqueeze(3)


def view_change(context: Float[Tensor, "b c p 2 3"], target: Float[Tensor, "b c p 2 3"]) -> Float[Tensor, "b c p 3"]:
    """Return the logarithms of the relative height and width of a target view, and 1 if it is mirrored or else 0."""
    ratio = split_box(target)[0] / split_box(context)[0]
    return torch.cat([ratio.abs().log(), (ratio[..., 1:] < 0).to(ratio.dtype)], dim=-1)


def split_box(boxes: Float[Tensor, "*shape 2 3"]) -> tuple[Float[Tensor, "*shape 2"], Float[Tensor, "*shape 2"]]:
    """Return the scales and the shifts of boxes for points (row, column)."""
    scale = torch.stack([boxes[..., 1, 1], boxes[..., 0, 0]], dim=-1)
    return scale, boxes[..., :, 2].flip(-1)


def match_levels(
    levels: Sequence[Level],
    context_boxes: Float[Tensor, "b c 2 3"],
    target_boxes: Float[Tensor, "b v 2 3"],
    views: Int64[Tensor, "c p"],
    grids: tuple[int, int, int],
) -> list[Matches]:
    """Return the target cells in other views that each context predicts, for every level with such targets.

    In each target view, a context predicts a fixed number of cells, as many as it has itself (but at most all of them): those
    closest to the center of its own view. A level of whole images has one cell, which always counts.

    Args:
        levels: The levels.
        context_boxes: Boxes of the contexts.
        target_boxes: Boxes of all global crops.
        views: Target views of each context.
        grids: Number of patches along a side of the context's view, of a global crop, and of an image of the full size.
    """
    context = context_boxes.unsqueeze(2).expand(-1, -1, views.shape[1], -1, -1)
    target = target_boxes[:, views]
    change, result = view_change(context, target), []
    order = views.flatten().argsort(stable=True).view(target_boxes.shape[1], -1)
    for level in levels:
        if level.other:
            own_side, side = (level.side(grid, grids[2]) for grid in grids[:2])
            places = place_points(context, target, cell_centers(side, views.device))
            distance = places.abs().amax(-1)
            distance, index = distance.topk(min(own_side, side) ** 2, dim=-1, largest=False, sorted=False)
            places = places.gather(3, index.unsqueeze(-1).expand(*index.shape, 2))
            inside = distance <= 1 if level.pool else torch.ones_like(index, dtype=torch.bool)
            result.append(Matches(Queries(level, places, change), order, index, inside))
    return result
