"""Predictions: how near each level's predictions come to what the teacher says, cell by cell, on held-out images."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.distributed.seeding import generator
from hjepa.masking import Masks
from hjepa.models.hjepa import HJEPA
from hjepa.plotting import GridCell, Scale, image_grid, mask_overlay
from hjepa.tasks.visualize.samples import PART, Samples

AVERAGED = 256  # images that the last row is a mean of


@dataclass(frozen=True)
class LevelSimilarity:
    """Cosine similarities of a level's predictions and targets, [B, C, P, T], at cells `index` of a grid; and those of the mean
    target, which any useful prediction must beat.
    """

    side: int
    index: Tensor
    cosine: Tensor
    constant: Tensor

    def grid(self, context: int | None) -> Tensor:
        """Similarity by cell [B, side, side], the mean where one was predicted several times and NaN where never.

        Args:
            context: of this context alone; None takes all.
        """
        chosen = slice(None) if context is None else slice(context, context + 1)
        index, cosine = self.index[:, chosen].flatten(1), self.cosine[:, chosen].flatten(1)
        sums = torch.zeros(len(index), self.side**2).scatter_add_(1, index, cosine)
        counts = torch.zeros_like(sums).scatter_add_(1, index, torch.ones_like(cosine))
        return (sums / counts).unflatten(1, (self.side, self.side))


def check_predictive(scene: Samples) -> None:
    """Refuse a run that predicts nothing."""
    if not scene.run.model.predictor:
        raise UserError(f"{scene.run.folder.name} predicts nothing (levels=none): leave predictions out of task.pictures.")


def draw_predictions(scene: Samples) -> list[Path]:
    """The images, what the student sees, and every level's similarity by cell; below, its mean over more images."""
    check_predictive(scene)
    shown = guess(scene, scene.rows, "shown")
    many = torch.arange(min(len(scene.pixels), AVERAGED)).split(PART)
    parts = [guess(scene, rows, "many", i)[0] for i, rows in enumerate(many)]
    scale = Scale("cosine of prediction and target", min(0.0, *(g.cosine.min().item() for g in shown[0].values())), 1.0)
    columns, bottom = ["image", "context"], [None, None]
    for name in shown[0]:
        guesses = [part[name] for part in parts]  # batches differ in how many cells their masks have
        cosine, constant = (torch.cat([getattr(g, key).flatten() for g in guesses]).mean() for key in ("cosine", "constant"))
        columns.append(f"{name}\n{cosine:.2f} on average\n(constant {constant:.2f})")
        mean = torch.cat([g.grid(None) for g in guesses]).nanmean(0)
        bottom.append(GridCell(mean, scale))  # type: ignore[arg-type]
    images, grids = scene.images, [guessed.grid(0) for guessed in shown[0].values()]
    context, side = shown[1].context[:, 0], scene.run.model.grid
    rows = [
        [GridCell(image), GridCell(mask_overlay(image, context[i], side)), *(GridCell(grid[i], scale) for grid in grids)]
        for i, image in enumerate(images)
    ]
    path = scene.path("predictions")
    note = (
        f"Last row: mean over {sum(map(len, many))} held-out images. Constant: of predicting the mean target everywhere. "
        "Gray: not predicted."
    )
    image_grid([*rows, bottom], columns, "Predictions beside the teacher's targets", path, note)
    return [path]


@torch.no_grad()
def guess(scene: Samples, rows: Tensor, *stream: int | str) -> tuple[dict[str, LevelSimilarity], Masks]:
    """Every level's similarities on some held-out images under masks of their own, on the CPU."""
    run = scene.run
    masks = run.sampler(len(rows), generator(0, "predictions", *stream))
    with run.hardware.autocast():
        output = run.model(scene.normalized(rows), masks.to(run.hardware.device))
    guesses = {}
    for level, (side, index) in zip(output.levels, places(run.model, masks), strict=True):
        prediction, target = level.prediction.float().cpu(), level.target.float().cpu()
        mean = target.flatten(0, -2).mean(0)
        cosines = (F.cosine_similarity(p, target, dim=-1) for p in (prediction, mean.expand_as(target)))
        guesses[level.name] = LevelSimilarity(side, index, *cosines)
    return guesses, masks


def places(model: HJEPA, masks: Masks) -> list[tuple[int, Tensor]]:
    """The grid's side and the cells [B, C, P, T] of every level of an output, in its order."""
    found = [(model.grid // pool, index) for pool, index in zip(model.levels.pool, masks.targets, strict=True)]
    if model.levels.summary:
        found.append(found[0])
    stacked_levels = model.upper.stacked_levels() if model.upper else []
    return found + [(stage.side, own.targets[0]) for stage, own in zip(stacked_levels, masks.stacked, strict=True)]
