"""Figures that training, visualization, benchmarks, sweeps and reports share: image grids, curves and mask overlays.

This module imports no torch, so that the plots of a sweep are drawn without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Affine2D

from hjepa.tracking.atomic import atomic_files

if TYPE_CHECKING:
    from torch import Tensor

    from hjepa.masking import Masks
    from hjepa.models.hjepa import HJEPA

# The colors of Okabe and Ito can be told apart with any kind of color vision; markers are a second cue.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = "osD^vPX"

COLORMAP = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")  # NaN is gray

DPI = 130

# Layout of image grids, in pixels.
CELL_SIZE = 150  # approximate side of a cell
GAP = 6  # space between cells
LINE_HEIGHT = 18
COLOR_BAR_WIDTH = 16
COLOR_BAR_SPACE = 100  # width of a color bar with its label and ticks

Box = tuple[float, float, float, float]  # left, bottom, width and height as fractions of the figure

# Captions of pictures, in the order in which reports show them.
CAPTIONS = {
    "curves": "Losses, probes beside their values before training (dotted), and collapse statistics, by optimizer step.",
    "masks": "The patches that the student sees, and the cells that each level predicts.",
    "views": "Two crops of an image, and how well the first one predicts the features of the second, by level and cell.",
    "predictions": "Cosine similarity of predictions and the teacher's targets, by cell, on held-out images.",
    "pca": "The first three principal components of patch features as colors: similar features have similar colors.",
    "attention": "Attention in the last block, and its rollout through all blocks.",
    "neighbors": "The most similar images by features of the trained network, of the untrained network, and by pixels.",
    "scatter": "t-SNE of image features: every point is an image, close to images with similar features.",
}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_files(path) as (temporary,):
            figure.savefig(temporary, dpi=DPI, format="png")
    finally:
        plt.close(figure)


# -- Image grids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColorScale:
    """A color scale, which several maps may share.

    Attributes:
        label: Label of the color bar.
        low: Value at the lower end.
        high: Value at the upper end.
    """

    label: str
    low: float
    high: float


@dataclass(frozen=True)
class Outline:
    """A rectangle on an image, in fractions of its width and height from the upper left corner."""

    color: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class GridCell:
    """An image or a map in a cell of an image grid.

    Attributes:
        content: Image float [3, h, w] in [0, 1], or map [h, w], NaN where it has no value.
        scale: Color scale of a map; None for an image.
        frame: Color of the frame; None for no frame.
        outlines: Rectangles to draw on an image.
    """

    content: Tensor
    scale: ColorScale | None = None
    frame: str | None = None
    outlines: Sequence[Outline] = ()


def image_grid(
    rows: Sequence[Sequence[GridCell | None]], headings: Sequence[str], title: str, path: Path, note: str = ""
) -> None:
    """Draw a grid of images and maps, whose pixels are enlarged by a whole number to squares.

    Args:
        rows: Rows of cells; None leaves a cell empty.
        headings: Headings of the columns.
        title: Title of the picture.
        path: PNG file to write.
        note: Text below the grid.
    """
    size = cell_size(rows)
    scales = list(dict.fromkeys(cell.scale for row in rows for cell in row if cell and cell.scale))
    header = (2 + max(heading.count("\n") + 1 for heading in headings)) * LINE_HEIGHT
    footer = LINE_HEIGHT * (1 + note.count("\n") if note else 0) + GAP
    right = len(headings) * (size + GAP) + GAP
    width = max(right + COLOR_BAR_SPACE * bool(scales), 10.5 * len(title), 8.5 * max(map(len, note.split("\n"))))
    height = header + len(rows) * (size + GAP) + footer
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(GAP / width, 1 - GAP / height, title, fontsize=10, fontweight="bold", va="top")
    figure.text(GAP / width, GAP / height, note, fontsize=8, va="bottom", color="0.3")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell:
                left, top = GAP + j * (size + GAP), header + i * (size + GAP)
                draw_cell(figure, cell, (left / width, 1 - (top + size) / height, size / width, size / height))
    for j, heading in enumerate(headings):
        center = GAP + j * (size + GAP) + size / 2
        figure.text(center / width, 1 - (header - 4) / height, heading, fontsize=8, ha="center", va="bottom")
    for k, scale in enumerate(scales):
        share = (height - header - footer) / len(scales)
        bottom = footer + (len(scales) - 1 - k) * share + 0.08 * share
        box = ((right + 2 * GAP) / width, bottom / height, COLOR_BAR_WIDTH / width, 0.84 * share / height)
        draw_color_bar(figure, scale, box)
    save_figure(figure, path)


def cell_size(rows: Sequence[Sequence[GridCell | None]]) -> int:
    """Return the side of a cell in pixels, a multiple of the side of the largest image."""
    side = max(cell.content.shape[-1] for row in rows for cell in row if cell)
    return side * max(1, round(CELL_SIZE / side))


def draw_cell(figure: Figure, cell: GridCell, box: Box) -> None:
    """Draw one image or map."""
    axis = figure.add_axes(box)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=cell.frame is not None, color=cell.frame, linewidth=2.5)
    if cell.scale:
        axis.imshow(cell.content.numpy(), cmap=COLORMAP, vmin=cell.scale.low, vmax=cell.scale.high, interpolation="nearest")
    else:
        axis.imshow(cell.content.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    whole_axis = Affine2D().scale(1, -1).translate(0, 1) + axis.transAxes
    for outline in cell.outlines:
        corner, size = (outline.left, outline.top), (outline.width, outline.height)
        axis.add_patch(Rectangle(corner, *size, transform=whole_axis, fill=False, edgecolor=outline.color, linewidth=2))


def draw_color_bar(figure: Figure, scale: ColorScale, box: Box) -> None:
    """Draw the color bar of a scale."""
    bar = figure.colorbar(ScalarMappable(Normalize(scale.low, scale.high), COLORMAP), cax=figure.add_axes(box))
    bar.set_label(scale.label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


# -- Training curves -------------------------------------------------------------------------------------------------------

PANELS = {
    "prediction loss": ("train/prediction", "validation/loss", "validation/constant_loss"),
    "probe accuracy": ("probe/linear", "probe/knn"),
    "variation across images": ("teacher/variation", "student/variation"),
    "effective rank": ("probe/rankme", "teacher/rank", "student/rank"),
}


def plot_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Plot losses, probes beside the untrained network, and collapse statistics, by optimizer step.

    Args:
        records: Records of metrics.jsonl, each with its `step`.
        path: PNG file to write.
    """
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.17, top=0.9, wspace=0.2)  # constrained layout would draw it twice
    for axis, (title, metrics) in zip(axes, PANELS.items(), strict=True):
        for color, metric in zip(COLORS, metrics, strict=False):
            plot_metric(axis, metric, records, color)
        axis.set(title=title, xlabel="optimizer step")
        if "accuracy" in title:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        if axis.lines:
            axis.legend(fontsize=7)
    save_figure(figure, path)


def plot_metric(axis: Axes, metric: str, records: list[dict[str, Any]], color: str) -> None:
    """Plot one metric, and the baseline of a probe as a dotted line: its first value.

    That is the untrained network or, where random weights were measured too (dash-dotted), the weights that the run started from.
    """
    points = [(record["step"], record[metric]) for record in records if metric in record]
    if not points:
        return
    axis.plot(*zip(*points, strict=True), color=color, marker="." if len(points) < 30 else None, label=metric)
    if not metric.startswith("probe/"):
        return
    name = metric.removeprefix("probe/")
    given = next((record for record in records if f"initial/{name}" in record), {})
    axis.axhline(points[0][1], color=color, linestyle=":", label=f"{'started from' if given else 'untrained'} {name}")
    if f"untrained/{name}" in given:
        axis.axhline(given[f"untrained/{name}"], color=color, linestyle="-.", label=f"random weights {name}")


# -- Masks -----------------------------------------------------------------------------------------------------------------


def plot_masks(images: Tensor, masks: Masks, model: HJEPA, path: Path) -> None:
    """Plot images, the first context of each, and the target cells of every level in that context.

    Stacked levels have two columns, as each has a context of its own: the cells of the level below that its student sees.

    Args:
        images: Images [B, 3, S, S] in [0, 1].
        masks: Masks of these images.
        model: Model that the masks were sampled for.
        path: PNG file to write.
    """
    columns = {"context": (masks.context, model.grid)}
    for level, index in zip(model.masked_levels, masks.targets, strict=True):
        pool = level.mask_pool
        columns[f"{level.name}:\n{pool}x{pool} patches"] = (index, model.grid // pool)
    stacked_levels = model.upper.stacked_levels() if model.upper else []
    for number, (stacked, own) in enumerate(zip(stacked_levels, masks.stacked, strict=True), start=1):
        columns[f"stacked{number}\ncontext"] = (own.context, stacked.side)
        columns[f"stacked{number}\ntargets"] = (own.targets[0], stacked.side)
    rows = [
        [GridCell(image), *(GridCell(mask_overlay(image, index[i, 0].flatten(), side)) for index, side in columns.values())]
        for i, image in enumerate(images)
    ]
    image_grid(rows, ["image", *columns], "Masks: what the student sees, and the cells that each level predicts", path)


def mask_overlay(image: Tensor, index: Tensor, side: int) -> Tensor:
    """Return an image [3, S, S] with everything outside the indexed cells of a side x side grid grayed out."""
    flags = image.new_zeros(side * side).index_fill(0, index, 1.0).view(side, side)
    scale = image.shape[-1] // side
    visible = flags.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return image * visible + 0.85 * (1 - visible) + 0.1 * image * (1 - visible)
