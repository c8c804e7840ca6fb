"""Quality of features without labels: how they are spread, how many dimensions they fill, how fast their spectrum falls."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hjepa.collapse import effective_rank, entropy_rank, spread
from hjepa.data.dataset import unit
from hjepa.errors import UserError
from hjepa.evaluate.features import Part
from hjepa.evaluate.study import Rows, Study
from hjepa.look.network import WHO, Who
from hjepa.rng import generator

FIRST, LAST = 11, 100  # eigenvalues that the power law is fitted to, counted from 1, as Agrawal et al. and Stringer et al. do


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


def figures(features: Tensor) -> dict[str, float]:
    """Figures of features [N, F] as they are: `spread`'s (its rank is the effective rank of Roy & Vetterli 2007, of the centred
    features), `rankme` (Garrido et al. 2023, of the features as they are), `alpha` (Agrawal et al. 2022).
    """
    alpha = alpha_req(features)
    return spread(features) | {"rankme": effective_rank(features)} | ({} if alpha is None else {"alpha": alpha})


def alpha_req(features: Tensor) -> float | None:
    """alpha-ReQ (Agrawal et al. 2022, eq. 2): the exponent of the power law i^-alpha that the eigenvalues of the covariance of
    [N, F] follow; about 1 is best, more means that few directions carry everything.

    The fit is that of the authors, Stringer et al.'s (2019): least squares on logarithms with weights 1 / i over eigenvalues 11
    to 100, or all of them where there are fewer than 20. None for features of one dimension or none.
    """
    centred = (features - features.mean(0)).cpu().double()
    values = torch.linalg.svdvals(centred).square() / (len(features) - 1)
    values = values[values > values[0] * 1e-12]  # the rank may be smaller than the width
    if len(values) < 2:
        return None
    first = FIRST if len(values) >= 20 else 1
    place = torch.arange(first, min(LAST, len(values)) + 1, dtype=torch.float64)
    x, y, weight = place.log(), values[first - 1 : LAST].log(), 1 / place
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return -((weight * x * y).sum() / (weight * x * x).sum()).item()


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2023, eqs. 1 to 4): the effective rank of the between-image covariance of [n, q, F] whitened by the
    within-image one, which `delta` makes invertible.
    """
    n, q, width = views.shape
    views = views.double()
    means = views.mean(1)
    between, within = means - means.mean(0), (views - means[:, None]).flatten(0, 1)
    covariance = within.T @ within / (n * (q - 1)) + delta * torch.eye(width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    whitened = between @ (vectors * values.rsqrt()) / (n - 1) ** 0.5
    return entropy_rank(torch.linalg.svdvals(whitened).square())
