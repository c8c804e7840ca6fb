"""What all pictures are drawn on: rows of images and maps in cells of whole pixels, and colors that everybody can tell apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from torch import Tensor  # a sweep's plot is drawn without torch
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from torch import Tensor, zeros

from hjepa.masking import Masks
from hjepa.models.hjepa import HJEPA

matplotlib.use("Agg")

# Okabe and Ito's colors, which people with any kind of color vision tell apart; the markers repeat the difference.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = "osD^vPX"

MAP = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")  # gray where there is no value

DPI = 130

CELL, GAP, LABEL, LINE, BAR = 150, 6, 16, 18, 100  # pixels: an image about so large, space, and room for text and a color bar


@dataclass(frozen=True)
class Scale:
    """A color scale that maps share: what it says, and its ends."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class GridCell:
    """An image float [3, h, w] in [0, 1], or a map [h, w] on a scale, NaN where it has no value; `frame` is a color."""

    picture: "Tensor"
    scale: Scale | None = None
    frame: str | None = None


def image_grid(rows: Sequence[Sequence[GridCell | None]], columns: Sequence[str], title: str, path: Path, note: str = "") -> None:
    """Draw rows of cells under column headings; pixels are shown as squares, whatever the size of the images.

    Args:
        note: a line below the picture.
    """
    cell = cell_pixels(rows)
    scales = list(dict.fromkeys(c.scale for row in rows for c in row if c and c.scale))
    head, foot = (
        (2 + max(column.count("\n") + 1 for column in columns)) * LINE,
        LINE * (1 + note.count("\n") if note else 0) + GAP,
    )
    right = len(columns) * (cell + GAP) + GAP
    width = max(right + BAR * bool(scales), 10.5 * len(title), 8.5 * max(map(len, note.split("\n"))))
    height = head + len(rows) * (cell + GAP) + foot
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(GAP / width, 1 - GAP / height, title, fontsize=10, fontweight="bold", va="top")
    figure.text(GAP / width, GAP / height, note, fontsize=8, va="bottom", color="0.3")
    for i, row in enumerate(rows):
        for j, content in enumerate(row):
            if content:
                left, top = GAP + j * (cell + GAP), head + i * (cell + GAP)
                draw_cell(figure, content, (left / width, 1 - (top + cell) / height, cell / width, cell / height))
    for j, column in enumerate(columns):
        middle = GAP + j * (cell + GAP) + cell / 2
        figure.text(middle / width, 1 - (head - 4) / height, column, fontsize=8, ha="center", va="bottom")
    for k, scale in enumerate(scales):
        tall = (height - head - foot) / len(scales)
        bottom = foot + (len(scales) - 1 - k) * tall + 0.08 * tall
        color_bar(figure, scale, ((right + 2 * GAP) / width, bottom / height, LABEL / width, 0.84 * tall / height))
    save(figure, path)


def cell_pixels(rows: Sequence[Sequence[GridCell | None]]) -> int:
    """The side of a cell: a whole multiple of the largest image's."""
    side = max(cell.picture.shape[-1] for row in rows for cell in row if cell)
    return side * max(1, round(CELL / side))


def draw_cell(figure: Figure, cell: GridCell, place: tuple[float, float, float, float]) -> None:
    """One image or map at (left, bottom, width, height), in shares of the figure."""
    axis = figure.add_axes(place)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=cell.frame is not None, color=cell.frame, linewidth=2.5)
    if cell.scale:
        axis.imshow(cell.picture.numpy(), cmap=MAP, vmin=cell.scale.low, vmax=cell.scale.high, interpolation="nearest")
    else:
        axis.imshow(cell.picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")


def color_bar(figure: Figure, scale: Scale, place: tuple[float, float, float, float]) -> None:
    """What the colors of a scale mean."""
    bar = figure.colorbar(ScalarMappable(Normalize(scale.low, scale.high), MAP), cax=figure.add_axes(place))
    bar.set_label(scale.name, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all, and forget it."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(temporary, dpi=DPI, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


Record = dict[str, Any]

PANELS = {
    "prediction loss": ("train/prediction", "validation/loss", "validation/constant_loss"),
    "probe accuracy": ("probe/linear", "probe/knn"),
    "variation across images": ("teacher/variation", "student/variation"),
    "effective rank": ("probe/rankme", "teacher/rank", "student/rank"),
}


def plot_curves(records: list[Record], path: Path) -> None:
    """Losses, probes beside the untrained network, and the collapse watch over optimizer steps."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.2), layout="constrained")
    for axis, (title, keys) in zip(axes, PANELS.items(), strict=True):
        for color, key in zip(COLORS, keys, strict=False):
            plot_metric(axis, key, [(r["step"], r[key]) for r in records if key in r], color)
        axis.set(title=title, xlabel="optimizer step")
        if "accuracy" in title:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        if axis.lines:
            axis.legend(fontsize=7)
    save(figure, path)


def plot_metric(axis: Axes, key: str, points: list[tuple[int, float]], color: str) -> None:
    """One metric; a probe beside what it was at the start."""
    if not points:
        return
    axis.plot(*zip(*points, strict=True), color=color, marker="." if len(points) < 30 else None, label=key)
    if key.startswith("probe/"):
        axis.axhline(points[0][1], color=color, linestyle=":", label=f"untrained {key.removeprefix('probe/')}")


def plot_masks(images: Tensor, masks: Masks, model: HJEPA, path: Path) -> None:
    """Images [B, 3, S, S] in [0, 1], what the student sees of them, and every level's target cells, all of the first context;
    of stacked levels, which see the level below, the cells that their own student sees too.
    """
    sets = {"context": (masks.context, model.grid)}
    for name, pool, index in zip(model.levels.names(), model.levels.pool, masks.targets, strict=True):
        sets[f"{name}:\n{pool}x{pool} patches"] = (index, model.grid // pool)
    stacked_levels = model.upper.stacked_levels() if model.upper else []
    for number, (stage, own) in enumerate(zip(stacked_levels, masks.stacked, strict=True), start=1):
        sets[f"stacked{number}\ncontext"] = (own.context, stage.side)
        sets[f"stacked{number}\ntargets"] = (own.targets[0], stage.side)
    rows = [
        [GridCell(image), *(GridCell(mask_overlay(image, index[i, 0].flatten(), side)) for index, side in sets.values())]
        for i, image in enumerate(images)
    ]
    image_grid(rows, ["image", *sets], "Masks: what the student sees, and the cells that each level predicts", path)


def mask_overlay(image: Tensor, index: Tensor, side: int) -> Tensor:
    """The image [3, S, S] with everything outside the indexed cells of a grid grayed out."""
    flags = zeros(side * side).index_fill(0, index, 1.0).view(side, side)
    scale = image.shape[-1] // side
    seen = flags.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return image * seen + 0.85 * (1 - seen) + 0.1 * image * (1 - seen)


CAPTIONS = {
    "curves": "Losses, probes beside the untrained network (dotted), and the collapse watch, by optimizer step.",
    "masks": "What the student sees, and the cells that each level predicts.",
    "predictions": "How near predictions come to the teacher's targets, cell by cell, on images that were not trained on.",
    "pca": "Patches of like color are alike to the network: three principal components of patch features.",
    "attention": "Where the network looks, in the last block and through all of them.",
    "neighbors": "The most similar images by features of the trained network, of the untrained one, and by pixels.",
    "scatter": "Every image a point, near others of like features (t-SNE).",
}
