"""Nearest neighbors: the held-out images with the most similar features, also of the untrained network and of the raw pixels."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from hjepa.data.datamodule import to_unit_range
from hjepa.plotting import COLORS, GridCell, image_grid
from hjepa.tasks.visualize.samples import Samples

NUM_NEIGHBORS = 4


def draw_neighbors(samples: Samples) -> list[Path]:
    """Draw, for every layer, the nearest neighbors of the images by trained, untrained and pixel features."""
    return [draw_layer_neighbors(samples, layer) for layer in samples.layers]


def draw_layer_neighbors(samples: Samples, layer: str) -> Path:
    """Draw the nearest neighbors by the features of one layer."""
    images, labels = to_unit_range(samples.pixels), samples.labels
    sources = {kind: features[layer] for kind, features in samples.features.items()} | {"pixels": images.flatten(1)}
    headings, rows = ["image"], [[GridCell(image)] for image in samples.images]
    for source, features in sources.items():
        neighbors = nearest_neighbors(features, NUM_NEIGHBORS)
        accuracy = "" if labels is None else f"\n{same_label_fraction(neighbors, labels):.0%} same class"
        headings += [f"{source} 1{accuracy}", *(f"{source} {i}" for i in range(2, neighbors.shape[1] + 1))]
        for row, query in zip(rows, samples.shown, strict=True):
            row += [GridCell(images[i], frame=frame_color(labels, query, i)) for i in neighbors[query]]
    path = samples.path("neighbors", layer)
    legend = "Blue frame: same class; orange frame: another class. " if labels is not None else ""
    note = f"{legend}Neighbors among {len(images)} held-out images; the percentages are over all of them."
    image_grid(rows, headings, f"Nearest neighbors, {layer}", path, note)
    return path


def nearest_neighbors(features: Tensor, count: int) -> Tensor:
    """Return the positions of the nearest other rows of features [N, F], by cosine of the centered features.

    The result is int64 [N, count], or [N, N - 1] if there are fewer other rows.
    """
    centered = F.normalize(features - features.mean(0), dim=1)
    similarity = centered @ centered.T
    return similarity.fill_diagonal_(-2.0).topk(min(count, len(features) - 1), dim=1).indices


def same_label_fraction(neighbors: Tensor, labels: Tensor) -> float:
    """Return the fraction of neighbors [N, K] that have the label of their image."""
    return (labels[neighbors] == labels.unsqueeze(1)).float().mean().item()


def frame_color(labels: Tensor | None, query: Tensor, neighbor: Tensor) -> str | None:
    """Return the color of the frame around a neighbor, None without labels."""
    if labels is None:
        return None
    return COLORS[0] if labels[query] == labels[neighbor] else COLORS[1]
