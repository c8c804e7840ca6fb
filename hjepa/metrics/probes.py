"""Linear and k-NN probes of frozen features, and the effective rank of the features.

Training and evaluation use the same protocol: features of images without augmentation, standardized with the
statistics of the training images, fitted on training images and scored on the validation images.

The features of an image are the mean patch token, followed by the mean summary token if there are summary tokens. With
`model.features=last` they are those of the encoder's last layer; with `model.features=all`, those of all layers (the blocks of a
ViT, the stages of a hierarchical network) side by side, from the first to the last. The patch tokens of a stage with a finer grid
are the tokens of its cells.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.terminal import progress_bar
from hjepa.config.types import PositiveFloat, PositiveInt
from hjepa.data.datamodule import Split
from hjepa.distributed.seeding import generator
from hjepa.metrics.collapse import effective_rank
from hjepa.models.encoder import Encoder

Features_co = TypeVar("Features_co", covariant=True)

CURVATURE = 0.1  # typical curvature p (1 - p) of the cross-entropy with ten classes


@dataclass(frozen=True)
class Probe:
    """Linear and k-NN accuracy for every label of a dataset.

    Args:
        every: Epochs between probes during training; the untrained network and the last epoch are always probed.
        train_images: Maximum number of training images; the same images are used each time.
        validation_images: Maximum number of validation images; the same images are used each time.
        neighbors: Number of neighbors of the weighted k-NN vote (Wu et al. 2018).
        temperature: Temperature of the weighted k-NN vote.
        penalties: Candidate L2 penalties of the logistic regression.
        batch_size: Images per forward pass.
    """

    every: PositiveInt
    train_images: PositiveInt
    validation_images: PositiveInt
    neighbors: PositiveInt
    temperature: PositiveFloat
    penalties: list[PositiveFloat]
    batch_size: PositiveInt

    def __post_init__(self) -> None:
        if not self.penalties:
            raise UserError("probe.penalties=[]: expected at least one L2 penalty.")

    def select_images(self, train: Split, validation: Split) -> tuple[Split, Split]:
        """Return the fixed random subsets of the labeled images that the probe uses."""
        if not train.labels:
            raise UserError("The probes need labels, and the images have none; sort them into class folders or use probe=none.")
        return subset(train, self.train_images), subset(validation, self.validation_images)

    def __call__(
        self,
        encoder: Encoder,
        train: Split,
        validation: Split,
        normalize: Callable[[Tensor], Tensor],
        progress: str | None = None,
    ) -> dict[str, float]:
        """Return the scores of an encoder.

        Args:
            encoder: Encoder whose features are probed.
            train: Images and labels to fit on.
            validation: Images and labels to score on.
            normalize: Function from uint8 images to the encoder's input.
            progress: Description of a progress bar; None shows no bar.

        Returns:
            Accuracies in [0, 1] as `linear` and `knn` for the main label and `linear_NAME` and `knn_NAME` for the others, and
            the effective rank as `rankme`. Labels of which either split knows no value are left out.
        """
        num_batches = sum(-(-len(split) // self.batch_size) for split in (train, validation))
        known = [name for name, labels in train.labels.items() if min(labels.max(), validation.labels[name].max()) >= 0]
        steps = num_batches + 2 * len(known)
        with progress_bar(desc=progress, total=steps, leave=False, disable=progress is None) as bar:

            def features(split: Split) -> Tensor:
                extracted = []
                for batch in extract_features(encoder, split.images[:].split(self.batch_size), normalize):
                    extracted.append(batch)
                    bar.update()
                return torch.cat(extracted)

            x, y = features(train), features(validation)
            scores = {"rankme": effective_rank(y)}
            x, y = standardize(x, y)
            for position, name in enumerate(known):
                labels, suffix = train.labels[name], f"_{name}" if position else ""
                scores[f"linear{suffix}"] = accuracy(self.linear(x, labels, y), validation.labels[name])
                bar.update()
                votes = knn(x, labels, y, self.neighbors, self.temperature)
                scores[f"knn{suffix}"] = accuracy(votes, validation.labels[name])
                bar.update()
        return scores

    def linear(self, x: Tensor, labels: Tensor, y: Tensor) -> Tensor:
        """Return the logits [M, classes] for y [M, D] of a logistic regression on x [N, D]; rows with the label -1 are left out.

        The penalty is selected on a fifth of x; then the regression is fitted on all of x.
        """
        x, labels = known_rows(x, labels)
        classes, held = int(labels.max()) + 1, len(x) // 5
        if len(self.penalties) == 1:
            return logistic(x, labels, classes, self.penalties[0])(y)
        axes = principal_axes(x[held:])
        fits = [logistic(x[held:], labels[held:], classes, penalty, axes)(x[:held]) for penalty in self.penalties]
        best = max(range(len(fits)), key=lambda i: accuracy(fits[i], labels[:held]))
        return logistic(x, labels, classes, self.penalties[best])(y)


def subset(split: Split, count: int) -> Split:
    """Return at most `count` labeled images of a split in a fixed random order."""
    return split[labeled_indices(split, count)]


def labeled_indices(split: Split, count: int | None) -> Tensor:
    """Return the positions of at most `count` labeled images (None for all of them) in a fixed random order."""
    labeled = (next(iter(split.labels.values())) >= 0).nonzero().squeeze(1)
    return labeled[torch.randperm(len(labeled), generator=generator(0, "probe"))[:count]]


class FeatureExtractor(Protocol[Features_co]):
    """A network with a method `features`: an `Encoder`, or several layers of one that return a feature vector each."""

    training: bool

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation mode."""

    def features(self, images: Tensor) -> Features_co:
        """Return the features of normalized images [B, 3, S, S]."""


@torch.no_grad()
def extract_features(
    network: FeatureExtractor[Features_co], batches: Iterable[Tensor], normalize: Callable[[Tensor], Tensor]
) -> Iterator[Features_co]:
    """Yield the features of every batch of uint8 images [B, 3, S, S], on the network's device and in evaluation mode.

    Probes, evaluation, export and pictures all extract features with this function.

    Args:
        network: Network.
        batches: Batches of images on any device, which may be decoded while the network computes.
        normalize: Function from uint8 images to the network's input.
    """
    for images in batches:
        training = network.training
        network.train(False)
        features = network.features(normalize(images.to(network.device)))
        network.train(training)
        yield features


def known_rows(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of x [N, D] whose labels [N] are known (not -1), and these labels."""
    known = labels >= 0
    return (x, labels) if known.all() else (x[known.to(x.device)], labels[known])


def standardize(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Standardize both sets of features with the mean and standard deviation per dimension of the training features."""
    mean, std = train.mean(0), train.std(0, correction=min(1, len(train) - 1)).clamp(min=1e-6)
    return (train - mean).div_(std), (other - mean).div_(std)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows whose highest logit is the label, among those whose label is known (not -1)."""
    labels = labels.to(logits.device)
    return (logits.argmax(1) == labels)[labels >= 0].float().mean().item()


def logistic(
    x: Tensor, labels: Tensor, classes: int, penalty: float, principal: tuple[Tensor, Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """Fit a multinomial logistic regression with L-BFGS and return it as a function from features to logits.

    Features are far from isotropic, so the solver works in coordinates along their principal axes, each scaled by the approximate
    curvature of the loss. The optimum is the same, and the solver needs tens of iterations instead of hundreds.

    Args:
        x: Features [N, D].
        labels: Class indices [N].
        classes: Number of classes.
        penalty: L2 penalty on the weights; the bias is not penalized.
        principal: `principal_axes(x)` if they have been computed already.
    """
    labels = labels.to(x.device)
    axes, variance = principal or principal_axes(x)
    scale = (CURVATURE * variance + penalty).rsqrt()
    axes = axes * scale
    coordinates = x @ axes
    weight = torch.zeros(len(scale), classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_change=1e-6, history_size=10, line_search_fn="strong_wolfe"
    )

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
    """Return orthonormal principal axes [D, R] of x [N, D] about the origin and the mean square [R] along each of them.

    R is at most the smaller of N and D.
    """
    n, width = x.shape
    if width <= n:
        values, vectors = torch.linalg.eigh((x.T @ x / n).cpu().double())  # Apple GPUs have neither eigh nor float64
    else:
        rows = x.cpu().double()
        values, vectors = torch.linalg.eigh(rows @ rows.T / n)
        nonzero = values > values[-1] * 1e-12  # smaller eigenvalues are rounding errors
        values = values[nonzero]
        vectors = rows.T @ vectors[:, nonzero] / (n * values).sqrt()
    return vectors.to(x), values.clamp(min=0).to(x)


def knn(x: Tensor, labels: Tensor, y: Tensor, neighbors: int, temperature: float, chunk: int = 1024) -> Tensor:
    """Return the votes [M, classes] of the nearest neighbors in x [N, D] for y [M, D], weighted by exp(cosine / temperature).

    The weights of a row of y are divided by the largest one, so that they do not vanish at a low temperature.

    Rows of x with the label -1 have no vote.
    """
    x, labels = known_rows(x, labels.to(x.device))
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    votes = []
    for queries in y.split(chunk):
        similarity, index = (queries @ x.T).topk(min(neighbors, len(x)), dim=1)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(queries), int(labels.max()) + 1, device=x.device).scatter_add_(1, labels[index], weight))
    return torch.cat(votes)
