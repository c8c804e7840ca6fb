"""The negatives of contrastive losses: cells and views of the other images of a batch."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def select_cells(cells: Float[Tensor, "b g k d"], count: int) -> Float[Tensor, "b g n d"]:
    """Select `count` cells of each image, spread over the image and shifted by one cell from each image to the next."""
    num_images, _, num_cells, dim = cells.shape
    spread = torch.arange(count, device=cells.device) * num_cells // count
    index = (torch.arange(num_images, device=cells.device).unsqueeze(1) + spread) % num_cells
    return cells.gather(2, index[:, None, :, None].expand(-1, cells.shape[1], -1, dim))


def log_sum_of_negatives(queries: Float[Tensor, "b g q d"], keys: Float[Tensor, "b g k d"]) -> Float[Tensor, "b g q"]:
    """Compute log(sum of e^(query . key)) over the keys of all other images in the same group."""
    b, g, q, _ = queries.shape
    similarity = queries.transpose(0, 1).flatten(1, 2) @ keys.transpose(0, 1).flatten(1, 2).mT  # [G, B*Q, B*K]
    same_image = similarity.view(g, b, q, b, -1).diagonal(dim1=1, dim2=3)
    same_image.fill_(-math.inf)
    return similarity.logsumexp(-1).view(g, b, q).transpose(0, 1)
