"""Quality of features without labels: how much they vary, how many dimensions they span, how fast their spectrum decays."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.terminal import progress_bar
from hjepa.data.datamodule import to_unit_range
from hjepa.distributed.seeding import generator
from hjepa.metrics.spectrum import feature_statistics, lidar
from hjepa.tasks.evaluate.features import LabeledImages
from hjepa.tasks.evaluate.protocol import EvalContext, EvalProtocol, Scores
from hjepa.tasks.trained_run import NetworkKind


@dataclass(frozen=True)
class Quality(EvalProtocol):
    """Statistics of the images to score on; LiDAR is computed from augmented views of some of them.

    Args:
        images: Number of images for LiDAR.
        views: Number of augmented views of each of these images.
    """

    images: int
    views: int

    percent = False

    def __post_init__(self) -> None:
        if self.images < 2 or self.views < 2:
            raise UserError(f"protocol.quality.images={self.images} and views={self.views}: expected at least 2 of each.")

    def check(self, context: EvalContext) -> None:
        context.data.subsets  # noqa: B018  # which raises for images that cannot be evaluated; labels are not needed

    def describe(self, context: EvalContext) -> str:
        count = len(context.data.subsets["test"])
        return (
            f"Quality of the features of {count} {context.data.test} images; rank: effective rank of the centered features; "
            f"lidar: of {min(count, self.images)} images in {self.views} views each"
        )

    def score(self, context: EvalContext) -> Scores:
        scores: Scores = {}
        layers, networks = context.features.layers(), context.features.networks
        progress = progress_bar(total=len(networks) * len(layers), desc="scoring quality", unit="source")
        for kind in networks:
            features, views = context.features.load(kind, "test"), self.view_features(context, kind)
            for layer in layers:
                rank = lidar(views[layer])
                scores[f"{kind}/{layer}"] = feature_statistics(features[layer]) | ({} if rank is None else {"lidar": rank})
                progress.update()
        progress.close()
        return scores

    def view_features(self, context: EvalContext, kind: NetworkKind) -> dict[str, Tensor]:
        """Return features [n, q, F] of q views of n images by layer; the views are the same for all networks."""
        test, dataset = context.data.subsets["test"], context.run.dataset
        images = LabeledImages(test.split, test.index[: self.images])
        batch_size = max(1, context.features.batch_size // self.views)
        batches = images.batches(batch_size, context.run.hardware.device, f"extracting features ({kind}, views)")
        features = []
        for i, batch in enumerate(batches):
            repeated = to_unit_range(batch).repeat_interleave(self.views, 0)
            params = dataset.augment.sample_params(len(repeated), generator(0, "lidar", i))
            views = dataset.standardize(dataset.augment(repeated, params))
            features.append({layer: rows.cpu() for layer, rows in context.features.networks[kind].features(views).items()})
        return {layer: torch.cat([rows[layer] for rows in features]).unflatten(0, (-1, self.views)) for layer in features[0]}
