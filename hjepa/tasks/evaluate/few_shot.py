"""Few-shot accuracy: logistic regression on a handful of labels, or on a small fraction of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import mean, stdev

import torch
from torch import Generator, Tensor

from hjepa.config.errors import NotApplicable, UserError
from hjepa.config.types import PositiveFloat, PositiveFraction, PositiveInt
from hjepa.distributed.seeding import generator
from hjepa.metrics.probes import accuracy, logistic
from hjepa.tasks.evaluate.protocol import EvalContext, EvalProtocol, Scores

SubsetSize = Callable[[int], int]  # number of images of a class -> number of images to sample


@dataclass(frozen=True)
class FewShot(EvalProtocol):
    """Logistic regression on random subsets of the labeled images, the same subsets for every source of features.

    The features are standardized with the statistics of all images to fit to, which needs no labels.

    Args:
        shots: Numbers of images per class.
        shares: Fractions of the images of every class, rounded up to whole images.
        draws: Number of random subsets; the standard deviation is over these.
        penalty: L2 penalty. The subsets are too small to choose it by validation.
    """

    shots: list[PositiveInt]
    shares: list[PositiveFraction]
    draws: PositiveInt
    penalty: PositiveFloat

    def __post_init__(self) -> None:
        if not self.shots and not self.shares:
            raise UserError("protocol.fewshot.shots=[] and shares=[]: expected at least one number of images or fraction.")

    def check(self, context: EvalContext) -> None:
        for name, labels, _ in context.labels():
            classes, counts = labels[labels >= 0].unique(return_counts=True)
            if self.shots and int(counts.min()) < max(self.shots):
                more = ", or raise task.train_images" if context.data.limits["train"] else ""
                raise NotApplicable(
                    f"protocol.fewshot.shots={list(self.shots)}: class {int(classes[counts.argmin()])} of the label {name} has "
                    f"only {int(counts.min())} images to sample from; set fewer shots{more}."
                )

    def describe(self, context: EvalContext) -> str:
        return (
            f"Few-shot linear probe, accuracy, mean and standard deviation over {self.draws} random subsets of the images to fit "
            f"to, {context.data.describe()}"
        )

    def score(self, context: EvalContext) -> Scores:
        scores: Scores = {}
        for source, x, y in context.sources("fewshot", last_only=True):
            columns = scores[source] = {}
            for name, train, test in context.labels():
                for column, size in self.subset_sizes().items():
                    subsets = [sample_subset(train, size, generator(0, "fewshot", column, i)) for i in range(self.draws)]
                    accuracies = [accuracy(self.fit(x, train, subset, y), test) for subset in subsets]
                    columns[f"{name}/{column}"] = mean(accuracies)
                    columns[f"{name}/{column} std"] = stdev(accuracies) if self.draws > 1 else 0.0
        return scores

    def subset_sizes(self) -> dict[str, SubsetSize]:
        """Return how many images of a class are sampled, by column of the table."""
        shots: dict[str, SubsetSize] = {f"{shot} per class": partial(min, shot) for shot in self.shots}
        return shots | {f"{100 * share:g} percent": lambda members, share=share: ceil(share * members) for share in self.shares}

    def fit(self, x: Tensor, labels: Tensor, subset: Tensor, y: Tensor) -> Tensor:
        """Return logits [M, classes] for y [M, D], fitted to a subset of x [N, D]."""
        return logistic(x[subset.to(x.device)], labels[subset], int(labels.max()) + 1, self.penalty)(y)


def sample_subset(labels: Tensor, size: SubsetSize, generator: Generator) -> Tensor:
    """Sample positions of `size(members)` images of every class, where `members` is the number of images of the class."""
    subset = []
    for label in labels[labels >= 0].unique():
        members = (labels == label).nonzero().squeeze(1)
        subset.append(members[torch.randperm(len(members), generator=generator)[: size(len(members))]])
    return torch.cat(subset)
