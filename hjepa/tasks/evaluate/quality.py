"""Quality of features without labels: how they are spread, how many dimensions they fill, how fast their spectrum falls."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.data.datamodule import unit
from hjepa.distributed.seeding import generator
from hjepa.metrics.spectrum import feature_statistics, lidar
from hjepa.tasks.evaluate.features import LabeledImages
from hjepa.tasks.evaluate.protocol import EvalContext, Scores
from hjepa.tasks.trained_run import NETWORK_KINDS, NetworkKind


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

    def check(self, study: EvalContext) -> None:
        """Any labeled images will do."""
        study.labels()

    def about(self, study: EvalContext) -> str:
        count = len(study.data.parts["test"])
        return (
            f"Quality of the features of {count} images; rank: effective rank of the centered features; lidar: of "
            f"{min(count, self.images)} images in {self.views} views each"
        )

    def __call__(self, study: EvalContext) -> Scores:
        rows: Scores = {}
        for who in NETWORK_KINDS:
            features, views = study.features(who, "test"), self.augmented(study, who)
            for name in study.features.names():
                rows[f"{who}/{name}"] = feature_statistics(features[name]) | {"lidar": lidar(views[name])}
        return rows

    def augmented(self, study: EvalContext, who: NetworkKind) -> dict[str, Tensor]:
        """Features [n, q, F] of q views of n images, by depth and stacked level; the same views for every network."""
        part, dataset, device = study.data.parts["test"], study.run.dataset, study.run.hardware.device
        chosen, found = LabeledImages(part.split, part.index[: self.images]), []
        batches = chosen.batches(max(1, study.features.batch_size // self.views), device, f"{who} views")
        for i, images in enumerate(batches):
            repeated = unit(images).repeat_interleave(self.views, 0)
            draws = dataset.augment.draw(len(repeated), generator(0, "lidar", i))
            views = dataset.standardize(dataset.augment(repeated, draws))
            found.append({name: row.cpu() for name, row in study.features.pooled(who, views).items()})
        return {name: torch.cat([rows[name] for rows in found]).unflatten(0, (-1, self.views)) for name in found[0]}
