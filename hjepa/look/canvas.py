"""What all pictures are drawn on: rows of images and maps in cells of whole pixels, and colours that everybody can tell apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from torch import Tensor  # a sweep's plot is drawn without torch

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; the markers repeat the difference.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MAP = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")  # grey where there is no value
DPI = 130
CELL, GAP, LABEL, LINE, BAR = 150, 6, 16, 18, 100  # pixels: an image about so large, space, and room for text and a colour bar


@dataclass(frozen=True)
class Scale:
    """A colour scale that maps share: what it says, and its ends."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """An image float [3, h, w] in [0, 1], or a map [h, w] on a scale, NaN where it has no value; `frame` is a colour."""

    picture: "Tensor"
    scale: Scale | None = None
    frame: str | None = None


def gallery(rows: Sequence[Sequence[Cell | None]], columns: Sequence[str], title: str, path: Path, note: str = "") -> None:
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
                draw(figure, content, (left / width, 1 - (top + cell) / height, cell / width, cell / height))
    for j, column in enumerate(columns):
        middle = GAP + j * (cell + GAP) + cell / 2
        figure.text(middle / width, 1 - (head - 4) / height, column, fontsize=8, ha="center", va="bottom")
    for k, scale in enumerate(scales):
        tall = (height - head - foot) / len(scales)
        bottom = foot + (len(scales) - 1 - k) * tall + 0.08 * tall
        color_bar(figure, scale, ((right + 2 * GAP) / width, bottom / height, LABEL / width, 0.84 * tall / height))
    save(figure, path)


def cell_pixels(rows: Sequence[Sequence[Cell | None]]) -> int:
    """The side of a cell: a whole multiple of the largest image's."""
    side = max(cell.picture.shape[-1] for row in rows for cell in row if cell)
    return side * max(1, round(CELL / side))


def draw(figure: Figure, cell: Cell, place: tuple[float, float, float, float]) -> None:
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
    """What the colours of a scale mean."""
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
