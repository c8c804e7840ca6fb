"""Few-shot accuracy: what a handful of labels, or a small share of them, is good for on top of the features."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import mean

import torch
from torch import Generator, Tensor

from hjepa.config.errors import UserError
from hjepa.distributed.seeding import generator
from hjepa.metrics.probes import accuracy, logistic
from hjepa.sweeps.tables import std
from hjepa.tasks.evaluate.protocol import EvalContext, Scores

Count = Callable[[int], int]


@dataclass(frozen=True)
class FewShot:
    """Logistic regression on few labeled images, drawn anew several times and alike for every source of features.

    The features are standardized with the statistics of all images to fit on, which takes no labels.

    Args:
        shots: images per class; shares: of the images of every class, at least one.
        draws: how often they are drawn; the spread is the standard deviation over the draws.
        penalty: L2 penalty; there are too few images to choose one with.
    """

    shots: list[int]
    shares: list[float]
    draws: int
    penalty: float

    def __post_init__(self) -> None:
        if min([1, *self.shots]) < 1 or not self.shots + self.shares or self.draws < 1 or self.penalty <= 0:
            raise UserError(
                f"task.fewshot.shots={list(self.shots)}, shares={list(self.shares)}, draws={self.draws} and "
                f"penalty={self.penalty}: expected numbers of images of at least 1, some draws, and a positive penalty."
            )
        if any(not 0 < share <= 1 for share in self.shares):
            raise UserError(f"task.fewshot.shares={list(self.shares)}: expected shares above 0 and at most 1.")

    def check(self, study: EvalContext) -> None:
        """Refuse classes with fewer images than shots."""
        for name, labels, _ in study.labels():
            classes, counts = labels[labels >= 0].unique(return_counts=True)
            if self.shots and int(counts.min()) < max(self.shots):
                raise UserError(
                    f"task.fewshot.shots={list(self.shots)}: class {int(classes[counts.argmin()])} of the label {name} has only "
                    f"{int(counts.min())} images to draw from; ask for fewer shots, or raise task.train_images."
                )

    def about(self, study: EvalContext) -> str:
        return (
            f"Few-shot linear probe, accuracy, mean and standard deviation over {self.draws} draws of the images to fit on, "
            f"{study.data.describe()}"
        )

    def __call__(self, study: EvalContext) -> Scores:
        rows: Scores = {}
        for source, x, y in study.pairs("fewshot", last_only=True):
            columns = rows[source] = {}
            for name, train, test in study.labels():
                for what, count in self.settings().items():
                    draws = [draw(train, count, generator(0, "fewshot", what, i)) for i in range(self.draws)]
                    found = [accuracy(self.fit(x, train, chosen, y), test) for chosen in draws]
                    columns |= {f"{name}/{what}": mean(found), f"{name}/{what} std": std(found)}
        return rows

    def settings(self) -> dict[str, Count]:
        """How many images of a class are drawn, by column."""
        shots: dict[str, Count] = {f"{shot} per class": partial(min, shot) for shot in self.shots}
        return shots | {f"{100 * share:g} percent": lambda members, share=share: ceil(share * members) for share in self.shares}

    def fit(self, x: Tensor, labels: Tensor, chosen: Tensor, y: Tensor) -> Tensor:
        """Logits [M, classes] for y [M, D], from the chosen of x [N, D]."""
        return logistic(x[chosen.to(x.device)], labels[chosen], int(labels.max()) + 1, self.penalty)(y)


def draw(labels: Tensor, count: Count, generator: Generator) -> Tensor:
    """Positions of as many images of every class as `count` makes of the number of its members."""
    chosen = []
    for label in labels[labels >= 0].unique():
        members = (labels == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[: count(len(members))]])
    return torch.cat(chosen)
