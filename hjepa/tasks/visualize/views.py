"""Views: how well one crop of an image predicts the features of another, cell by cell."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.distributed.seeding import generator
from hjepa.masking import MaskSampler
from hjepa.models.hjepa import HJEPA
from hjepa.models.output import LevelOutput
from hjepa.plotting import COLORS, ColorScale, GridCell, image_grid
from hjepa.tasks.visualize.samples import Samples
from hjepa.training.preview import TwoCrops


def check_views(samples: Samples) -> None:
    """Raise `UserError` if no level of the run predicts other views."""
    if not samples.run.model.needs_views:
        raise UserError(f"{samples.run.folder.name} predicts no other views: leave views out of task.pictures.")


@torch.no_grad()
def draw_views(samples: Samples) -> list[Path]:
    """Draw two crops of the images, and by level and cell how similar the prediction from the first is to the second."""
    run, scale = samples.run, ColorScale("cosine of prediction and target", 0.0, 1.0)
    pixels = samples.pixels[samples.shown].to(run.hardware.device)
    crops = TwoCrops.sample(run.dataset, pixels, 0, "views")
    levels = predicted_levels(run.model, run.sampler, crops)
    maps = [similarity_map(level) for level in levels]
    rows = [
        [*crops.row(i), GridCell(crops.pixels(i, 1), frame=COLORS[1]), *(GridCell(grid[i], scale) for grid in maps)]
        for i in range(len(pixels))
    ]
    headings = ["image", "one crop", "another crop"]
    headings += [f"{level.name}\n{grid.nanmean():.2f} on average" for level, grid in zip(levels, maps, strict=True)]
    path = samples.path("views")
    note = "Gray: not shown by the first crop."
    image_grid(rows, headings, "Similarity of predictions and targets in another crop", path, note)
    return [path]


def predicted_levels(model: HJEPA, sampler: MaskSampler, crops: TwoCrops) -> list[LevelOutput]:
    """Return the output of every level whose targets lie in other views."""
    masks = sampler(len(crops.crops), generator(0, "views", "masks")).to(crops.crops.device)
    output = model(crops.crops, masks, None, crops.boxes, 2)
    names = {level.name for level in model.levels if level.other}
    return [level for level in output.levels if level.name in names]


def similarity_map(level: LevelOutput) -> Tensor:
    """Return the cosine of prediction and target by cell of the second crop [B, side, side], NaN where there is no prediction."""
    assert level.index is not None
    assert level.valid is not None
    cosine = F.cosine_similarity(level.prediction[:, 1].float(), level.target[:, 1].float(), dim=-1)
    cosine = cosine.masked_fill(~level.valid[:, 1], torch.nan).cpu()
    num_cells = level.cells.shape[2]
    grid = torch.full((len(cosine), num_cells), torch.nan).scatter_(1, level.index[:, 1].cpu(), cosine)
    return grid.unflatten(1, (round(num_cells**0.5), -1))
