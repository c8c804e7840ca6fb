"""Predictions: the cosine similarity of every level's predictions and the teacher's targets, by cell, on held-out images."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.distributed.seeding import generator
from hjepa.masking import Masks
from hjepa.models.hjepa import HJEPA
from hjepa.plotting import ColorScale, GridCell, image_grid, mask_overlay
from hjepa.tasks.visualize.samples import BATCH_SIZE, Samples

NUM_AVERAGED = 256  # the last row is a mean over at most this many images


@dataclass(frozen=True)
class LevelSimilarity:
    """Cosine similarities of the predictions of one level and their targets.

    Attributes:
        side: Side of the level's grid of cells.
        index: Predicted cells [B, C, P, T].
        cosine: Similarity of prediction and target [B, C, P, T].
        constant: Similarity of the mean target and the target [B, C, P, T], which a useful prediction exceeds.
    """

    side: int
    index: Tensor
    cosine: Tensor
    constant: Tensor

    def grid(self, context: int | None) -> Tensor:
        """Return the mean similarity by cell [B, side, side], NaN for cells that were not predicted.

        Args:
            context: Number of the context; None averages over all contexts.
        """
        contexts = slice(None) if context is None else slice(context, context + 1)
        index, cosine = self.index[:, contexts].flatten(1), self.cosine[:, contexts].flatten(1)
        sums = torch.zeros(len(index), self.side**2).scatter_add_(1, index, cosine)
        counts = torch.zeros_like(sums).scatter_add_(1, index, torch.ones_like(cosine))
        return (sums / counts).unflatten(1, (self.side, self.side))


def check_predictions(samples: Samples) -> None:
    """Raise `UserError` if no level of the run predicts hidden cells of the same view."""
    if not samples.run.model.masked_levels:
        raise UserError(
            f"{samples.run.folder.name} predicts no hidden cells (levels=none, or all targets lie in other views, as in the "
            "picture views): leave predictions out of task.pictures."
        )


def draw_predictions(samples: Samples) -> list[Path]:
    """Draw the images, the first context, and the similarities of every level; the last row is a mean over more images."""
    levels, masks = level_similarities(samples, samples.shown, "shown")
    batches = torch.arange(min(len(samples.pixels), NUM_AVERAGED)).split(BATCH_SIZE)
    averaged = [level_similarities(samples, batch, "many", i)[0] for i, batch in enumerate(batches)]
    low = min(level.cosine.min().item() for level in levels.values())
    scale = ColorScale("cosine of prediction and target", min(0.0, low), 1.0)
    headings = ["image", "context"]
    last_row: list[GridCell | None] = [None, None]
    for name in levels:
        similarities = [batch[name] for batch in averaged]  # their number of predicted cells differs
        cosine, constant = (torch.cat([getattr(s, key).flatten() for s in similarities]).mean() for key in ("cosine", "constant"))
        headings.append(f"{name}\n{cosine:.2f} on average\n(constant {constant:.2f})")
        last_row.append(GridCell(torch.cat([s.grid(None) for s in similarities]).nanmean(0), scale))
    grids = [level.grid(0) for level in levels.values()]
    context, side = masks.context[:, 0], samples.run.model.grid
    rows = [
        [GridCell(image), GridCell(mask_overlay(image, context[i], side)), *(GridCell(grid[i], scale) for grid in grids)]
        for i, image in enumerate(samples.images)
    ]
    path = samples.path("predictions")
    note = (
        f"Last row: mean over {sum(map(len, batches))} held-out images. Constant: similarity of the mean target to all targets. "
        "Gray: not predicted."
    )
    image_grid([*rows, last_row], headings, "Similarity of predictions and the teacher's targets", path, note)
    return [path]


@torch.no_grad()
def level_similarities(samples: Samples, index: Tensor, *stream: int | str) -> tuple[dict[str, LevelSimilarity], Masks]:
    """Compute the similarities of every level on held-out images, on the CPU, and the masks that they belong to.

    Args:
        samples: Run and held-out images.
        index: Positions of the images.
        *stream: Name of the random stream of the masks.
    """
    run = samples.run
    masks = run.sampler(len(index), generator(0, "predictions", *stream))
    with run.hardware.autocast():
        output = run.model(samples.normalized(index), masks.to(run.hardware.device))
    similarities = {}
    for level, (side, cells) in zip(output.levels, target_cells(run.model, masks), strict=True):
        prediction, target = (x.float().cpu().reshape(*cells.shape, -1) for x in (level.prediction, level.target))
        mean = target.flatten(0, -2).mean(0)
        cosine, constant = (F.cosine_similarity(p, target, dim=-1) for p in (prediction, mean.expand_as(target)))
        similarities[level.name] = LevelSimilarity(side, cells, cosine, constant)
    return similarities, masks


def target_cells(model: HJEPA, masks: Masks) -> list[tuple[int, Tensor]]:
    """Return the side of the grid and the target cells [B, C, P, T] of every level, in the order of the model's output."""
    rows = zip(model.masked_levels, masks.targets, strict=True)
    cells = [(level.grid, level.target_cells(index)) for level, index in rows]
    if model.summary_weight:
        cells.append(cells[0])
    stacked_levels = model.upper.stacked_levels() if model.upper else []
    return cells + [(level.side, own.targets[0]) for level, own in zip(stacked_levels, masks.stacked, strict=True)]
