"""Fine-tuning: the encoder and a linear head trained end to end on the labels, from trained and from random weights."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.errors import NotApplicable
from hjepa.config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from hjepa.data.datamodule import DataModule, to_unit_range
from hjepa.distributed.seeding import generator, seed_global
from hjepa.metrics.probes import accuracy
from hjepa.models.encoder import Encoder
from hjepa.optim.optimizers import TOKENS, is_matrix
from hjepa.optim.schedules import CosineSchedule
from hjepa.optim.step_plan import StepPlan
from hjepa.tasks.evaluate.features import LabeledImages
from hjepa.tasks.evaluate.protocol import EvalContext, EvalProtocol, Scores
from hjepa.tasks.trained_run import NetworkKind

CLIP_NORM = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class FineTuning(EvalProtocol):
    """AdamW on the sum of the cross-entropies of all labels, with warmup, cosine decay and the augmentations of the run.

    Args:
        epochs: Number of epochs.
        lr: Peak learning rate.
        weight_decay: Weight decay of the matrices.
        batch_size: Number of images per step.
        warmup_epochs: Length of the linear warmup of the learning rate.
    """

    epochs: PositiveInt
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    batch_size: PositiveInt
    warmup_epochs: NonNegativeFloat

    def check(self, context: EvalContext) -> None:
        super().check(context)
        self.plan(context)

    def plan(self, context: EvalContext) -> StepPlan:
        """Return the steps of the training; the last few images of an epoch, which do not fill a batch, are left out."""
        count = len(context.data.subsets["train"])
        if self.batch_size > count:
            raise NotApplicable(
                f"protocol.finetune.batch_size={self.batch_size}: expected at most {count}, the number of images to train on."
            )
        return StepPlan(count, self.epochs, None, self.batch_size)

    def describe(self, context: EvalContext) -> str:
        return f"Fine-tuned for {self.epochs} epochs, accuracy, {context.data.describe()}"

    def score(self, context: EvalContext) -> Scores:
        layer, networks = context.features.layers()[0], context.features.networks
        return {f"{kind}/{layer}": self.fine_tune(context, network.encoder, kind) for kind, network in networks.items()}

    def fine_tune(self, context: EvalContext, encoder: Encoder, kind: NetworkKind) -> dict[str, float]:
        """Fine-tune a copy of an encoder, and return its accuracy on the images to score on by label."""
        test = context.data.subsets["test"]
        device, normalize = context.run.hardware.device, context.run.dataset.normalize
        seed_global(context.run.config["seed"], "finetune")
        classifier = Classifier(encoder, {name: int(label.max()) + 1 for name, label, _ in context.labels()}).to(device)
        self.train(classifier.train(), context, kind)
        classifier.eval()
        with torch.no_grad():
            batches = test.batches(context.features.batch_size, device, f"scoring finetune ({kind})")
            logits = [classifier(normalize(images)) for images in batches]
        return {name: accuracy(torch.cat([batch[name] for batch in logits]), label) for name, _, label in context.labels()}

    def train(self, classifier: "Classifier", context: EvalContext, kind: NetworkKind) -> None:
        """Train a classifier; all random numbers are functions of the run's seed and the step."""
        plan, images, seed = self.plan(context), context.data.subsets["train"], context.run.config["seed"]
        hardware, dataset = context.run.hardware, context.run.dataset
        scaler = hardware.scaler()
        learning_rates = CosineSchedule(self.lr, 0.0, warmup_epochs=min(self.warmup_epochs, self.epochs))(plan)
        optimizer = torch.optim.AdamW(parameter_groups(classifier, self.weight_decay), lr=self.lr)
        order = torch.cat([shuffle(plan, seed, epoch) for epoch in range(self.epochs)])
        batches = LabeledImages(images.split, images.index[order]).batches(
            plan.batch_size, hardware.device, f"fine-tuning ({kind})"
        )
        for step, (batch, rows) in enumerate(zip(batches, order.split(plan.batch_size), strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rates[step]
            with hardware.autocast():
                logits = classifier(augment(dataset, batch, seed, step))
            loss = cross_entropy(logits, {name: label[rows] for name, label, _ in context.labels()})
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(classifier.parameters(), CLIP_NORM)
            scaler.step(optimizer)
            scaler.update()


class Classifier(nn.Module):
    """A copy of an encoder with a linear head per label on its pooled features.

    Args:
        encoder: Encoder to copy.
        num_classes: Number of classes by label.
    """

    def __init__(self, encoder: Encoder, num_classes: dict[str, int]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.feature_dim, count) for name, count in num_classes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits [B, classes] by label of normalized images [B, 3, S, S]."""
        features = self.encoder.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return the trainable parameters in two groups, with weight decay (matrices) and without, as in pre-training."""
    by_decay: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            by_decay[is_matrix(parameter) and not name.endswith(TOKENS)].append(parameter)
    return [{"params": by_decay[True], "weight_decay": weight_decay}, {"params": by_decay[False], "weight_decay": 0.0}]


def shuffle(plan: StepPlan, seed: int, epoch: int) -> Tensor:
    """Return the order of the images of an epoch, without those that do not fill a batch."""
    order = torch.randperm(plan.num_images, generator=generator(seed, "finetune order", epoch))
    return order[: plan.steps_in_epoch(epoch) * plan.batch_size]


def augment(dataset: DataModule, images: Tensor, seed: int, step: int) -> Tensor:
    """Return augmented, normalized images float [B, 3, S, S] of uint8 images."""
    params = dataset.augment.sample_params(len(images), generator(seed, "finetune augment", step))
    return dataset.standardize(dataset.augment(to_unit_range(images), params))


def cross_entropy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Return the sum of the cross-entropies of all labels with known values; unknown ones (-1) are ignored."""
    losses = [
        F.cross_entropy(logits[name].float(), label.to(logits[name].device), ignore_index=-1)
        for name, label in labels.items()
        if label.max() >= 0
    ]
    return torch.stack(losses).sum()
