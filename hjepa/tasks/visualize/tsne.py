"""t-SNE: held-out images as points, near one another where their features are (van der Maaten and Hinton 2008)."""

from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from sklearn.manifold import TSNE
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.metrics.probes import standardize
from hjepa.plotting import COLORS, MARKERS, save
from hjepa.tasks.trained_run import NETWORK_KINDS
from hjepa.tasks.visualize.samples import Samples

CLASSES = 10  # at most so many are drawn, as more colors cannot be told apart

POINTS = 1000

FEWEST = 8  # images that t-SNE can arrange


def draw_tsne(scene: Samples) -> list[Path]:
    """A row of panels per layer: trained beside untrained, every class in a color."""
    keep, label = chosen(scene.label, len(scene.pixels))
    if len(keep) < FEWEST:
        raise UserError(f"{len(keep)} held-out images are too few for scatter; expected at least {FEWEST}.")
    layers = scene.layers
    figure, axes = plt.subplots(len(layers), 2, figsize=(10.5, 4.4 * len(layers)), layout="constrained", squeeze=False)
    for row, layer in zip(axes, layers, strict=True):
        for axis, kind in zip(row, NETWORK_KINDS, strict=True):
            scatter(axis, arrange(scene.features[kind][layer][keep]), label, names(scene, label))
            axis.set_title(f"{layer}, {kind}", fontsize=10)
    if label is not None:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"t-SNE of {len(keep)} held-out images (distances between far groups mean nothing)", fontsize=11)
    path = scene.path("scatter")
    save(figure, path)
    return [path]


def chosen(label: Tensor | None, total: int) -> tuple[Tensor, Tensor | None]:
    """Positions of the images to draw, and their labels: of at most `CLASSES` classes, spread evenly over all there are."""
    if label is None:
        return torch.arange(total)[:POINTS], None
    classes = label[label >= 0].unique()
    classes = classes[torch.linspace(0, len(classes) - 1, min(CLASSES, len(classes))).long()]
    keep = torch.isin(label, classes).nonzero().squeeze(1)[:POINTS]
    return keep, label[keep]


def arrange(features: Tensor) -> Tensor:
    """Standardized features [N, F] as points [N, 2]; the same for the same features."""
    plain = standardize(features, features)[0].numpy()
    perplexity = min(30.0, (len(plain) - 1) / 3)
    return torch.from_numpy(TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(plain))


def names(scene: Samples, label: Tensor | None) -> dict[int, str]:
    """What the classes among the labels are called."""
    if label is None:
        return {}
    known = scene.run.dataset.class_names(next(iter(scene.held_out.labels)))
    return {c: known[c] if c < len(known) else f"class {c}" for c in label.unique().tolist()}


def scatter(axis: Axes, points: Tensor, label: Tensor | None, classes: dict[int, str]) -> None:
    """Points [N, 2] in the colors and markers of their classes."""
    axis.set(xticks=[], yticks=[])
    if label is None:
        axis.plot(points[:, 0], points[:, 1], ".", color=COLORS[0], markersize=4, alpha=0.7)
    for number, (value, name) in enumerate(classes.items()):
        x, y = points[label == value].T
        color, marker = COLORS[number % len(COLORS)], MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
        axis.scatter(x, y, s=14, c=color, marker=marker, alpha=0.75, linewidths=0, label=name)
