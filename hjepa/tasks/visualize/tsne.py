"""t-SNE (van der Maaten and Hinton 2008): held-out images as points, close to images with similar features."""

from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from sklearn.manifold import TSNE
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.metrics.probes import standardize
from hjepa.plotting import COLORS, MARKERS, save_figure
from hjepa.tasks.trained_run import NETWORK_KINDS
from hjepa.tasks.visualize.samples import Samples

MAX_CLASSES = 10  # more colors are hard to tell apart

MAX_POINTS = 1000

MIN_POINTS = 8  # t-SNE is meaningless for fewer images


def check_tsne(samples: Samples) -> None:
    """Raise `UserError` if there are too few images."""
    count = len(select_images(samples.labels, len(samples.split))[0])
    if count < MIN_POINTS:
        raise UserError(f"{count} held-out images are too few for scatter; expected at least {MIN_POINTS}.")


def draw_tsne(samples: Samples) -> list[Path]:
    """Draw one row of panels per layer, trained beside untrained, with one color per class."""
    index, labels = select_images(samples.labels, len(samples.pixels))
    layers = samples.layers
    figure, axes = plt.subplots(len(layers), 2, figsize=(10.5, 4.4 * len(layers)), layout="constrained", squeeze=False)
    for row, layer in zip(axes, layers, strict=True):
        for axis, kind in zip(row, NETWORK_KINDS, strict=True):
            plot_points(axis, tsne(samples.features[kind][layer][index]), labels, class_names(samples, labels))
            axis.set_title(f"{layer}, {kind}", fontsize=10)
    if labels is not None:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"t-SNE of {len(index)} held-out images (distances between distant groups have no meaning)", fontsize=11)
    path = samples.path("scatter")
    save_figure(figure, path)
    return [path]


def select_images(labels: Tensor | None, total: int) -> tuple[Tensor, Tensor | None]:
    """Return positions and labels of the images to draw, of at most `MAX_CLASSES` evenly spaced classes."""
    if labels is None:
        return torch.arange(total)[:MAX_POINTS], None
    classes = labels[labels >= 0].unique()
    classes = classes[torch.linspace(0, len(classes) - 1, min(MAX_CLASSES, len(classes))).long()]
    index = torch.isin(labels, classes).nonzero().squeeze(1)[:MAX_POINTS]
    return index, labels[index]


def tsne(features: Tensor) -> Tensor:
    """Map standardized features [N, F] to points [N, 2], deterministically; equal features to the origin."""
    if (features == features[0]).all():  # for which scikit-learn crashes
        return torch.zeros(len(features), 2)
    standardized = standardize(features, features)[0].numpy()
    perplexity = min(30.0, (len(standardized) - 1) / 3)
    return torch.from_numpy(TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(standardized))


def class_names(samples: Samples, labels: Tensor | None) -> dict[int, str]:
    """Return the name of every class among the labels."""
    if labels is None:
        return {}
    names = samples.run.dataset.class_names(next(iter(samples.split.labels)))
    return {c: names[c] if c < len(names) else f"class {c}" for c in labels.unique().tolist()}


def plot_points(axis: Axes, points: Tensor, labels: Tensor | None, classes: dict[int, str]) -> None:
    """Plot points [N, 2] with the colors and markers of their classes."""
    axis.set(xticks=[], yticks=[])
    if labels is None:
        axis.plot(points[:, 0], points[:, 1], ".", color=COLORS[0], markersize=4, alpha=0.7)
    for number, (value, name) in enumerate(classes.items()):
        x, y = points[labels == value].T
        color, marker = COLORS[number % len(COLORS)], MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
        axis.scatter(x, y, s=14, c=color, marker=marker, alpha=0.75, linewidths=0, label=name)
