"""Masks on images: what the student sees, and the cells that each level has to predict."""

from pathlib import Path

from torch import Tensor, zeros

from hjepa.look.canvas import Cell, gallery
from hjepa.masks import Masks
from hjepa.model import HJEPA


def plot_masks(images: Tensor, masks: Masks, model: HJEPA, path: Path) -> None:
    """Images [B, 3, S, S] in [0, 1], what the student sees of them, and every level's target cells, all of the first context;
    of stacked levels, which see the level below, the cells that their own student sees too.
    """
    sets = {"context": (masks.context, model.grid)}
    for name, pool, index in zip(model.levels.names(), model.levels.pool, masks.targets, strict=True):
        sets[f"{name}:\n{pool}x{pool} patches"] = (index, model.grid // pool)
    stages = model.upper.stages() if model.upper else []
    for number, (stage, own) in enumerate(zip(stages, masks.stacked, strict=True), start=1):
        sets[f"stacked{number}\ncontext"] = (own.context, stage.side)
        sets[f"stacked{number}\ntargets"] = (own.targets[0], stage.side)
    rows = [
        [Cell(image), *(Cell(shade(image, index[i, 0].flatten(), side)) for index, side in sets.values())]
        for i, image in enumerate(images)
    ]
    gallery(rows, ["image", *sets], "Masks: what the student sees, and the cells that each level predicts", path)


def shade(image: Tensor, index: Tensor, side: int) -> Tensor:
    """The image [3, S, S] with everything outside the indexed cells of a grid greyed out."""
    flags = zeros(side * side).index_fill(0, index, 1.0).view(side, side)
    scale = image.shape[-1] // side
    seen = flags.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return image * seen + 0.85 * (1 - seen) + 0.1 * image * (1 - seen)
