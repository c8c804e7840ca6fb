"""Fine-tuning: the trained encoder with a linear head, trained end to end on the labels; the untrained one beside it."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.data.datamodule import DataModule, unit
from hjepa.distributed.seeding import generator, seed_global
from hjepa.metrics.probes import accuracy
from hjepa.models.vit import ViTEncoder
from hjepa.optim.optimizers import TOKENS
from hjepa.optim.schedules import CosineSchedule
from hjepa.optim.step_plan import StepPlan
from hjepa.tasks.evaluate.features import LabeledImages
from hjepa.tasks.evaluate.protocol import EvalContext, Scores

CLIP = 1.0  # norm of the gradient


@dataclass(frozen=True)
class FineTuning:
    """AdamW on the sum of every label's cross-entropy; the learning rate warms up and then falls as half a cosine, and images
    are augmented as they were in training.

    Args:
        epochs, lr, weight_decay, batch_size, warmup_epochs: of the training.
    """

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    warmup_epochs: float

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0 or min(self.weight_decay, self.warmup_epochs) < 0:
            raise UserError(
                f"task.finetune.epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}, "
                f"weight_decay={self.weight_decay} and warmup_epochs={self.warmup_epochs}: expected at least one epoch and "
                "image, a positive rate, and no negative numbers."
            )

    def check(self, study: EvalContext) -> None:
        """Refuse batches that are larger than the training part."""
        self.plan(study)

    def plan(self, study: EvalContext) -> StepPlan:
        """The steps, of which the last few images of an epoch are left out."""
        images = len(study.data.parts["train"])
        if self.batch_size > images:
            raise UserError(f"task.finetune.batch_size={self.batch_size}: expected at most {images}, the images to train on.")
        return StepPlan(images, self.epochs, None, self.batch_size)

    def about(self, study: EvalContext) -> str:
        return f"Fine-tuned for {self.epochs} epochs, accuracy, {study.data.describe()}"

    def __call__(self, study: EvalContext) -> Scores:
        encoders = {"trained": study.run.encoder, "untrained": study.run.untrained}
        return {f"{who}/block {encoder.depth}": self.tune(study, encoder, who) for who, encoder in encoders.items()}

    def tune(self, study: EvalContext, encoder: ViTEncoder, who: str) -> dict[str, float]:
        """Accuracies on the images to score on, by label, of a fine-tuned copy of an encoder."""
        train, test = (study.data.parts[role] for role in ("train", "test"))
        device, normalize = study.run.hardware.device, study.run.dataset.normalize
        seed_global(study.run.config["seed"], "finetune")
        network = Classifier(encoder, {name: int(label.max()) + 1 for name, label in train.labels.items()}).to(device)
        self.train(network.train(), study, who)
        network.eval()
        with torch.no_grad():
            batches = test.batches(study.features.batch_size, device, f"scoring the {who} network")
            logits = [network(normalize(images)) for images in batches]
        return {name: accuracy(torch.cat([part[name] for part in logits]), label) for name, label in test.labels.items()}

    def train(self, network: "Classifier", study: EvalContext, who: str) -> None:
        """Train a network: every draw is a function of the run's seed and the step."""
        plan, part, seed = self.plan(study), study.data.parts["train"], study.run.config["seed"]
        hardware, dataset = study.run.hardware, study.run.dataset
        scaler = hardware.scaler()
        rates = CosineSchedule(self.lr, 0.0, warmup_epochs=min(self.warmup_epochs, self.epochs))(plan)
        optimizer = torch.optim.AdamW(groups(network, self.weight_decay), lr=self.lr)
        order = torch.cat([shuffled(plan, seed, epoch) for epoch in range(self.epochs)])
        batches = LabeledImages(part.split, part.index[order]).batches(
            plan.batch_size, hardware.device, f"fine-tuning the {who} network"
        )
        for step, (images, rows) in enumerate(zip(batches, order.split(plan.batch_size), strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            with hardware.autocast():
                logits = network(augmented(dataset, images, seed, step))
            loss = cross_entropy(logits, {name: label[rows] for name, label in part.labels.items()})
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()


class Classifier(nn.Module):
    """A copy of an encoder with a linear head per label on its pooled features.

    Args:
        classes: number of classes by label.
    """

    def __init__(self, encoder: ViTEncoder, classes: dict[str, int]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.feature_dim, count) for name, count in classes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalized images [B, 3, S, S] -> logits [B, classes] by label."""
        features = self.encoder.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters that decay (matrices) and those that do not, as in pre-training."""
    decays: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in network.named_parameters():
        if p.requires_grad:
            decays[p.ndim > 1 and not name.endswith(TOKENS)].append(p)
    return [{"params": decays[True], "weight_decay": weight_decay}, {"params": decays[False], "weight_decay": 0.0}]


def shuffled(plan: StepPlan, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's images, without those that fill no batch."""
    order = torch.randperm(plan.images, generator=generator(seed, "finetune order", epoch))
    return order[: plan.steps_in_epoch(epoch) * plan.batch_size]


def augmented(dataset: DataModule, images: Tensor, seed: int, step: int) -> Tensor:
    """Augmented, normalized images, float [B, 3, S, S], of uint8 ones."""
    draws = dataset.augment.draw(len(images), generator(seed, "finetune augment", step))
    return dataset.standardize(dataset.augment(unit(images), draws))


def cross_entropy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """The sum over the labels; unknown ones (-1) count nothing."""
    losses = [
        F.cross_entropy(logits[name].float(), label.to(logits[name].device), ignore_index=-1) for name, label in labels.items()
    ]
    return torch.stack(losses).sum()
