"""PCA of patch features as colors: patches with similar features have similar colors, in all images of a column."""

from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from hjepa.plotting import GridCell, image_grid
from hjepa.tasks.visualize.samples import Samples


def draw_pca(samples: Samples) -> list[Path]:
    """Draw the first three principal components of every layer, trained and untrained, as red, green and blue."""
    headings, columns = ["image"], [list(samples.images)]
    for layer in samples.layers:
        for kind, tokens in samples.tokens.items():
            side = tokens[layer].grid
            colors, explained = pca_colors(tokens[layer].cells)
            headings.append(f"{layer}\n{kind}\n{explained:.0%} of variance")
            columns.append(list(colors.permute(0, 2, 1).unflatten(2, (side, side))))
    rows = [[GridCell(image) for image in row] for row in zip(*columns, strict=True)]
    path = samples.path("pca")
    note = "Each column has its own three components, which are the same for all of its images."
    image_grid(rows, headings, "Principal components of patch features as colors", path, note)
    return [path]


def pca_colors(tokens: Tensor) -> tuple[Tensor, float]:
    """Return the first three principal components of tokens [B, n, D] as colors, and the fraction of variance they explain.

    All images share the components. Each component is scaled so that its 1st to 99th percentile spans [0, 1], and its largest
    loading is positive, because the sign of a component is arbitrary. The colors are [B, n, 3].
    """
    flat = tokens.flatten(0, 1).double().numpy()
    with np.errstate(invalid="ignore"):  # the explained variance of constant tokens is 0 / 0
        pca = PCA(min(3, *flat.shape), svd_solver="full").fit(flat)
    explained = float(np.nan_to_num(pca.explained_variance_ratio_).sum())
    largest = np.abs(pca.components_).argmax(1, keepdims=True)
    scores = torch.from_numpy(pca.transform(flat) * np.sign(np.take_along_axis(pca.components_, largest, 1)).T)
    scores = torch.nn.functional.pad(scores, (0, 3 - scores.shape[1]))
    low, high = (scores.quantile(q, dim=0) for q in (0.01, 0.99))
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float().unflatten(0, tokens.shape[:2]), explained
