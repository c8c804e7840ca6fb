"""PCA of patch features as colors: patches that the network takes for alike have like colors, in all images of a picture."""

from pathlib import Path

import torch
from torch import Tensor

from hjepa.plotting import GridCell, image_grid
from hjepa.tasks.visualize.samples import Samples


def draw_pca(scene: Samples) -> list[Path]:
    """The images beside the first three principal components of every layer, trained and untrained, as red, green, blue."""
    images = scene.images
    columns, pictures = ["image"], [list(images)]
    for layer in scene.layers:
        for kind, looks in scene.tokens.items():
            colors, share = pca_colors(looks[layer].cells)
            side = int(colors.shape[1] ** 0.5)
            columns.append(f"{layer}\n{kind}\n{share:.0%} of variance")
            pictures.append(list(colors.permute(0, 2, 1).unflatten(2, (side, side))))
    rows = [[GridCell(picture) for picture in row] for row in zip(*pictures, strict=True)]
    path = scene.path("pca")
    note = "Each column has its own three components, common to all of its images."
    image_grid(rows, columns, "Principal components of patch features as colors", path, note)
    return [path]


def pca_colors(tokens: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of tokens [B, n, D] (one basis for all), each scaled to [0, 1] from its 1st to its
    99th percentile, [B, n, 3]; and their share of the variance.
    """
    flat = tokens.flatten(0, 1).double()
    centered = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    basis = vectors[:, -3:].flip(1)
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # a component has no sign of its own
    scores = centered @ basis
    low, high = (scores.quantile(q, dim=0) for q in (0.01, 0.99))
    share = (values[-3:].sum() / values.sum().clamp(min=1e-12)).item()
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float().unflatten(0, tokens.shape[:2]), share
