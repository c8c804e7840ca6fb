"""Probes: is the representation any good? Linear and k-NN classification of frozen features, and their effective rank.

One protocol, online and offline: features of the teacher (mean patch token, plus mean summary token if any) of unaugmented
images, standardized with the training part's statistics, fitted on training images, scored on the validation part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.data.datamodule import Split
from hjepa.distributed.seeding import generator
from hjepa.metrics.collapse import effective_rank
from hjepa.models.vit import ViTEncoder

CURVATURE = 0.1  # about that of the cross-entropy, p (1 - p), with ten classes


@dataclass(frozen=True)
class Probe:
    """Linear and k-NN accuracy for every label of a dataset.

    Args:
        every: epochs between probes during training; the untrained network and the last epoch are always probed.
        train_images, validation_images: at most this many, the same ones each time.
        neighbors, temperature: of the weighted k-NN vote (Wu et al. 2018).
        penalties: L2 penalties of the logistic regression to choose from.
        batch_size: images per forward pass.
    """

    every: int
    train_images: int
    validation_images: int
    neighbors: int
    temperature: float
    penalties: list[float]
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("every", "train_images", "validation_images", "neighbors", "batch_size", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"probe.{name}={getattr(self, name)} must be positive.")
        if not self.penalties or min(self.penalties) <= 0:
            raise UserError(f"probe.penalties={list(self.penalties)}: give at least one, all positive.")

    def choose(self, train: Split, validation: Split) -> tuple[Split, Split]:
        """The labeled images that the probe uses, a fixed random choice."""
        if not train.labels:
            raise UserError("The images have no labels, which the probes need; sort them into class folders or use probe=none.")
        return subset(train, self.train_images), subset(validation, self.validation_images)

    def __call__(
        self, encoder: ViTEncoder, train: Split, validation: Split, normalize: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Scores of an encoder: `linear`, `knn` (fractions, main label), `linear_NAME`, `knn_NAME`, `rankme`."""
        x, y = (extract(encoder, split.images[:], normalize, self.batch_size) for split in (train, validation))
        scores = {"rankme": effective_rank(y)}
        x, y = standardize(x, y)
        for position, name in enumerate(train.labels):
            suffix = f"_{name}" if position else ""
            scores[f"linear{suffix}"] = accuracy(self.linear(x, train.labels[name], y), validation.labels[name])
            votes = knn(x, train.labels[name], y, self.neighbors, self.temperature)
            scores[f"knn{suffix}"] = accuracy(votes, validation.labels[name])
        return scores

    def linear(self, x: Tensor, labels: Tensor, y: Tensor) -> Tensor:
        """Logits [M, classes] for y [M, D]: logistic regression on x [N, D], its penalty chosen on a fifth of x."""
        classes, held = int(labels.max()) + 1, len(x) // 5
        if len(self.penalties) == 1:
            return logistic(x, labels, classes, self.penalties[0])(y)
        fits = [logistic(x[held:], labels[held:], classes, penalty)(x[:held]) for penalty in self.penalties]
        best = max(range(len(fits)), key=lambda i: accuracy(fits[i], labels[:held]))
        return logistic(x, labels, classes, self.penalties[best])(y)


def subset(split: Split, count: int) -> Split:
    """At most `count` labeled images of a split, in a fixed random order."""
    return split[labeled_indices(split, count)]


def labeled_indices(split: Split, count: int | None) -> Tensor:
    """Positions of at most `count` labeled images (None: of all) in a fixed random order."""
    known = (next(iter(split.labels.values())) >= 0).nonzero().squeeze(1)
    return known[torch.randperm(len(known), generator=generator(0, "probe"))[:count]]


@torch.no_grad()
def extract(encoder: ViTEncoder, images: Tensor, normalize: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
    """Features float32 [N, D] of uint8 images [N, 3, S, S], on the encoder's device."""
    device = encoder.pos_embed.device
    training = encoder.training
    encoder.eval()
    features = [encoder.features(normalize(part.to(device))) for part in images.split(batch_size)]
    encoder.train(training)
    return torch.cat(features).float()


def standardize(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the training features' mean and standard deviation per dimension taken out."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    return (train - mean).div_(std), (other - mean).div_(std)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose highest logit is the label."""
    return (logits.argmax(1) == labels.to(logits.device)).float().mean().item()


def logistic(x: Tensor, labels: Tensor, classes: int, penalty: float) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression with an L2 penalty on the weights, by L-BFGS: a function from features to logits.

    Features are far from isotropic, so the solver works along their principal axes, each scaled by what the curvature of the
    loss is about there: the optimum is the same and comes in tens of steps instead of hundreds.
    """
    labels = labels.to(x.device)
    axes, variance = principal_axes(x)
    scale = (CURVATURE * variance + penalty).rsqrt()
    axes = axes * scale
    coordinates = x @ axes
    weight = torch.zeros(len(scale), classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(coordinates @ weight + bias, labels)
        loss = loss + penalty / 2 * (scale[:, None] * weight).square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    solution, offset = axes @ weight.detach(), bias.detach()
    return lambda features: features @ solution + offset


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes [D, R] of x [N, D] about 0 and the mean square along each [R]; R is the smaller of N and D at most."""
    n, width = x.shape
    if width <= n:
        values, vectors = torch.linalg.eigh((x.T @ x / n).cpu().double())  # Apple GPUs can neither
    else:
        rows = x.cpu().double()
        values, vectors = torch.linalg.eigh(rows @ rows.T / n)
        there = values > values[-1] * 1e-12  # below it is rounding
        values = values[there]
        vectors = rows.T @ vectors[:, there] / (n * values).sqrt()
    return vectors.to(x), values.clamp(min=0).to(x)


def knn(x: Tensor, labels: Tensor, y: Tensor, neighbors: int, temperature: float, chunk: int = 1024) -> Tensor:
    """Votes [M, classes] of the nearest of x [N, D] for each of y [M, D], weighted by exp(cosine / temperature)."""
    labels = labels.to(x.device)
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    votes = []
    for part in y.split(chunk):
        similarity, index = (part @ x.T).topk(min(neighbors, len(x)), dim=1)
        weight = ((similarity - 1) / temperature).exp()
        votes.append(torch.zeros(len(part), int(labels.max()) + 1, device=x.device).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)
