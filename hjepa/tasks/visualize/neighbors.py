"""Nearest neighbors: which held-out images the network takes for alike, beside the untrained network and the bare pixels."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from hjepa.data.datamodule import unit
from hjepa.plotting import COLORS, GridCell, image_grid
from hjepa.tasks.trained_run import NETWORK_KINDS
from hjepa.tasks.visualize.samples import Samples

NEAREST = 4


def draw_neighbors(scene: Samples) -> list[Path]:
    """Per layer a picture: the images, and of each its nearest others by trained, untrained and pixel features."""
    return [draw_layer(scene, layer) for layer in scene.layers]


def draw_layer(scene: Samples, layer: str) -> Path:
    """The picture of one layer."""
    images, label = unit(scene.pixels), scene.label
    kinds = {kind: scene.features[kind][layer] for kind in NETWORK_KINDS} | {"pixels": images.flatten(1)}
    columns, rows = ["image"], [[GridCell(image)] for image in scene.images]
    for kind, features in kinds.items():
        found = nearest(features, NEAREST)
        share = "" if label is None else f"\n{same_class(found, label):.0%} same class"
        count = found.shape[1]
        columns += [f"{kind} 1{share}", *(f"{kind} {i}" for i in range(2, count + 1))]
        for row, query in zip(rows, scene.rows, strict=True):
            row += [GridCell(images[i], frame=frame(label, query, i)) for i in found[query]]
    path = scene.path("neighbors", layer)
    frames = "Blue frame: the same class; orange frame: another one. " if label is not None else ""
    note = f"{frames}Searched among {len(images)} held-out images; the shares are over all of them."
    image_grid(rows, columns, f"Nearest neighbors, {layer}", path, note)
    return path


def nearest(features: Tensor, count: int) -> Tensor:
    """The most similar other rows of features [N, F], by cosine of the centered features: int64 [N, count]."""
    unit_length = F.normalize(features - features.mean(0), dim=1)
    similarity = unit_length @ unit_length.T
    return similarity.fill_diagonal_(-2.0).topk(min(count, len(features) - 1), dim=1).indices


def same_class(found: Tensor, label: Tensor) -> float:
    """The share of neighbors [N, K] that have the label of their image."""
    return (label[found] == label.unsqueeze(1)).float().mean().item()


def frame(label: Tensor | None, query: Tensor, other: Tensor) -> str | None:
    """The color around a neighbor."""
    if label is None:
        return None
    return COLORS[0] if label[query] == label[other] else COLORS[1]
