"""Quality of features without labels: how they are spread, how many dimensions they fill, how fast their spectrum falls."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.data.datamodule import unit
from hjepa.distributed.seeding import generator
from hjepa.metrics.spectrum import figures, lidar
from hjepa.tasks.evaluate.features import Part
from hjepa.tasks.evaluate.protocol import Rows, Study
from hjepa.tasks.trained_run import WHO, Who


@dataclass(frozen=True)
class Quality:
    """Figures of the images that are scored on; LiDAR's of augmented views of some of them.

    Args:
        images, views: LiDAR's numbers of images and of views of each.
    """

    images: int
    views: int

    def __post_init__(self) -> None:
        if self.images < 2 or self.views < 2:
            raise UserError(f"task.quality.images={self.images} and views={self.views}: expected at least 2 of each.")

    def refuse(self, study: Study) -> None:
        """Any labelled images will do."""
        study.labels()

    def about(self, study: Study) -> str:
        count = len(study.data.parts["test"])
        return (
            f"Quality of the features of {count} images; rank: effective rank of the centred features; lidar: of "
            f"{min(count, self.images)} images in {self.views} views each"
        )

    def __call__(self, study: Study) -> Rows:
        rows: Rows = {}
        for who in WHO:
            features, views = study.features(who, "test"), self.augmented(study, who)
            for name in study.features.names():
                rows[f"{who}/{name}"] = figures(features[name]) | {"lidar": lidar(views[name])}
        return rows

    def augmented(self, study: Study, who: Who) -> dict[str, Tensor]:
        """Features [n, q, F] of q views of n images, by depth and stacked level; the same views for every network."""
        part, dataset, device = study.data.parts["test"], study.run.dataset, study.run.hardware.device
        chosen, found = Part(part.split, part.index[: self.images]), []
        batches = chosen.batches(max(1, study.features.batch_size // self.views), device, f"{who} views")
        for i, images in enumerate(batches):
            repeated = unit(images).repeat_interleave(self.views, 0)
            draws = dataset.augment.draw(len(repeated), generator(0, "lidar", i))
            views = dataset.standardise(dataset.augment(repeated, draws))
            found.append({name: row.cpu() for name, row in study.features.look(who, views).items()})
        return {name: torch.cat([rows[name] for rows in found]).unflatten(0, (-1, self.views)) for name in found[0]}
