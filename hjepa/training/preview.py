"""Pictures of what a run predicts, drawn at its start: hidden patches, or the cells that two crops of an image have in common."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hjepa.data.datamodule import DataModule, to_unit_range
from hjepa.distributed.seeding import generator
from hjepa.models.hjepa import HJEPA
from hjepa.models.views import match_levels, target_views
from hjepa.plotting import COLORS, GridCell, Outline, image_grid, mask_overlay, plot_masks
from hjepa.training.build import Components


def plot_preview(components: Components, images: Tensor, folder: Path) -> list[Path]:
    """Plot what the run hides and predicts of uint8 images [B, 3, S, S], and return the PNG files."""
    model, seed, files = components.model, components.seed, []
    if components.sampler.hides_patches:
        files.append(folder / "masks.png")
        plot_masks(images / 255, components.sampler(len(images), generator(seed, "preview")), model, files[-1])
    if model.needs_views:
        files.append(folder / "views.png")
        plot_views(TwoCrops.sample(components.dataset, images, seed, "preview"), model, files[-1])
    return files


@dataclass(frozen=True)
class TwoCrops:
    """Two augmented crops of B images.

    Attributes:
        images: The images, float [B, 3, S, S] in [0, 1].
        crops: The crops, normalized, [2B, 3, S, S]; those of an image follow one another.
        boxes: Their boxes [B, 2, 2, 3], see `hjepa.models.views`.
        dataset: The dataset that has made them.
    """

    images: Tensor
    crops: Tensor
    boxes: Tensor
    dataset: DataModule

    @classmethod
    def sample(cls, dataset: DataModule, images: Tensor, seed: int, *stream: str) -> "TwoCrops":
        """Crop uint8 images [B, 3, S, S] by the augmentation of the dataset, with the random numbers of a stream."""
        params = dataset.augment.sample_params(2 * len(images), generator(seed, *stream)).unflatten(1, (len(images), 2))
        pixels = to_unit_range(images)
        return cls(pixels, *dataset.crop(pixels, params, None, None), dataset)

    def row(self, index: int) -> list[GridCell]:
        """Return an image with the outlines of its crops, and the first crop."""
        outlines = [outline(box, color) for box, color in zip(self.boxes[index], COLORS, strict=False)]
        return [GridCell(self.images[index].cpu(), outlines=outlines), GridCell(self.pixels(index, 0), frame=COLORS[0])]

    def pixels(self, index: int, crop: int) -> Tensor:
        """Return a crop of an image with values in [0, 1], on the CPU."""
        return (self.crops[2 * index + crop] * self.dataset.std + self.dataset.mean).cpu()


def outline(box: Tensor, color: str) -> Outline:
    """Return the outline of a crop in fractions of the side of its image."""
    width, height = (2 * box.diagonal()).abs().tolist()
    x, y = box[:, 2].tolist()
    return Outline(color, (x + 1 - width / 2) / 2, (y + 1 - height / 2) / 2, width / 2, height / 2)


def plot_views(crops: TwoCrops, model: HJEPA, path: Path) -> None:
    """Plot images, two crops of each, and the cells of the second one that every level predicts from the first one.

    Args:
        crops: The images and their crops.
        model: Model with levels whose targets lie in other views.
        path: PNG file to write.
    """
    views = target_views(2, 1, False, crops.boxes.device)
    matches = match_levels(model.levels, crops.boxes, crops.boxes, views, (model.grid,) * 3)
    names = [match.queries.level.name for match in matches]
    rows = []
    for i in range(len(crops.images)):
        row = crops.row(i)
        for match in matches:
            cells, side = match.cell[i, 0][match.inside[i, 0]].cpu(), match.queries.level.side(model.grid, model.grid)
            row.append(GridCell(mask_overlay(crops.pixels(i, 1), cells, side), frame=COLORS[1]))
        rows.append(row)
    headings = ["image", "one crop", *(f"another crop:\n{name}" for name in names)]
    image_grid(rows, headings, "Views: what one crop predicts of another", path, "Gray: not shown by the first crop.")
