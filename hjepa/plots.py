"""Pictures of a run: its curves and its masks."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from hjepa.levels import Levels
from hjepa.masks import Masks

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
        for color, key in enumerate(keys):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                axis.plot(*zip(*points, strict=True), color=f"C{color}", marker="." if len(points) < 30 else None, label=key)
                if key.startswith("probe/"):
                    axis.axhline(points[0][1], color=f"C{color}", linestyle=":", label=f"untrained {key.removeprefix('probe/')}")
        axis.set(title=title, xlabel="optimizer step")
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_masks(images: Tensor, masks: Masks, levels: Levels, grid: int, path: Path) -> None:
    """Images [B, 3, S, S] in [0, 1], what the student sees of them, and every level's target cells (first context)."""
    rows = len(images)
    titles = [
        "image",
        "context",
        *(f"{name}: {pool}x{pool} cells" for name, pool in zip(levels.names(), levels.pool, strict=True)),
    ]
    figure, axes = plt.subplots(rows, len(titles), figsize=(1.7 * len(titles), 1.8 * rows), layout="constrained", squeeze=False)
    sets = [
        (masks.context[:, 0], 1),
        *((t[:, 0].flatten(1), p) for t, p in zip(masks.targets, levels.pool, strict=True)),
    ]
    for row in range(rows):
        shown = [images[row], *(shade(images[row], index[row], grid, pool) for index, pool in sets)]
        for axis, picture, title in zip(axes[row], shown, titles, strict=True):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.axis("off")
            if row == 0:
                axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shade(image: Tensor, index: Tensor, grid: int, pool: int) -> Tensor:
    """The image with everything outside the indexed cells greyed out."""
    side = grid // pool
    flags = torch.zeros(side * side).index_fill(0, index, 1.0).view(side, side)
    scale = image.shape[-1] // side
    seen = flags.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return image * seen + 0.85 * (1 - seen) + 0.1 * image * (1 - seen)
