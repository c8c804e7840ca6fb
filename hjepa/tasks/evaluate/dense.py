"""Dense accuracy: do the patch features say which part, or background, the patch shows? On `dataset=shapes`, where every pixel's
part is known by construction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from hjepa.config.errors import UserError
from hjepa.data.datamodule import unit
from hjepa.data.shapes import PARTS, Shapes
from hjepa.metrics.probes import accuracy, logistic, standardize
from hjepa.models.layers import patchify
from hjepa.tasks.evaluate.features import LabeledImages, Subset
from hjepa.tasks.evaluate.protocol import EvalContext, Scores
from hjepa.tasks.trained_run import NETWORK_KINDS, NetworkKind

CLASSES = 1 + len(PARTS)  # the background first

Patches = tuple[Tensor, Tensor, Tensor, Tensor]  # features and labels of the patches to fit on, and of those to score on


@dataclass(frozen=True)
class DenseProbe:
    """Logistic regression on the patch tokens of every depth, and on the patches' pixels.

    Args:
        train_images, test_images: at most so many images, all of whose patches are used.
        coverage: share of a patch that a part must cover for the patch to be called one of it.
        penalty: L2 penalty.
    """

    train_images: int
    test_images: int
    coverage: float
    penalty: float

    def __post_init__(self) -> None:
        if min(self.train_images, self.test_images) < 1 or not 0 < self.coverage <= 1 or self.penalty <= 0:
            raise UserError(
                f"task.dense.train_images={self.train_images}, test_images={self.test_images}, coverage={self.coverage} and "
                f"penalty={self.penalty}: expected at least one image of each, a share above 0, and a positive penalty."
            )

    def check(self, study: EvalContext) -> None:
        """Refuse datasets of which nobody knows what the patches show."""
        if not isinstance(study.data.dataset, Shapes):
            raise UserError(
                "task.protocols: dense is for runs on dataset=shapes, where it is known what every patch shows; leave it out."
            )

    def about(self, study: EvalContext) -> str:
        counts = {role: len(part) for role, part in self.parts(study).items()}
        background = (self.truths(study)["test"] == 0).double().mean().item()
        return (
            f"Dense: which part a patch shows, by a linear probe of the patches of {counts['train']} images, scored on those of "
            f"{counts['test']} ({background:.1%} of them show the background)"
        )

    def __call__(self, study: EvalContext) -> Scores:
        rows: Scores = {}
        run = study.run
        parts, truths = self.parts(study), self.truths(study)
        names = [name for name in study.features.names() if name.startswith("block")]
        progress = tqdm(total=2 * len(names) + 1, desc="dense", unit="row", disable=None)
        for who in NETWORK_KINDS:
            for name in names:
                tokens = {role: patch_tokens(study, who, name, part) for role, part in parts.items()}
                rows[f"{who}/{name}"] = self.judge(tokens, truths)
                progress.update()
        size = run.encoder.patch_size
        raw = {role: patchify(unit(part.split.images[part.index]), size).flatten(0, 1) for role, part in parts.items()}
        rows["pixels"] = self.judge({role: x.to(run.hardware.device) for role, x in raw.items()}, truths)
        progress.close()
        return rows

    def parts(self, study: EvalContext) -> dict[Subset, LabeledImages]:
        """The images that are used."""
        counts: dict[Subset, int] = {"train": self.train_images, "test": self.test_images}
        return {role: LabeledImages(part.split, part.index[: counts[role]]) for role, part in study.data.parts.items()}

    def truths(self, study: EvalContext) -> dict[Subset, Tensor]:
        """What the patches of these images show, int64 [n * patches]."""
        dataset, size = study.data.dataset, study.run.encoder.patch_size
        assert isinstance(dataset, Shapes)
        everything = dataset.patch_parts("train", size, self.coverage)
        keep, held = dataset.parts(dataset.load("train").labels["part"])
        test = everything[held] if study.data.test == "validation" else dataset.patch_parts("test", size, self.coverage)
        shown: dict[Subset, Tensor] = {"train": everything[keep], "test": test}
        return {role: shown[role][part.index].flatten().to(study.run.hardware.device) for role, part in self.parts(study).items()}

    def judge(self, patches: dict[Subset, Tensor], truths: dict[Subset, Tensor]) -> dict[str, float]:
        """Accuracy, and mean intersection over union, of patches [n, F]."""
        x, y = standardize(patches["train"], patches["test"])
        logits = logistic(x, truths["train"], CLASSES, self.penalty)(y)
        return {"accuracy": accuracy(logits, truths["test"]), "miou": mean_iou(logits.argmax(1), truths["test"])}


def patch_tokens(study: EvalContext, who: NetworkKind, layer: str, part: LabeledImages) -> Tensor:
    """Patch tokens [n * patches, D] of a layer, image by image in raster order."""
    batches = part.batches(study.features.batch_size, study.run.hardware.device, f"{who}, {layer}")
    network, normalize = study.features.layer_features[who], study.run.dataset.normalize
    return torch.cat([network.tokens(normalize(images))[layer].cells for images in batches]).flatten(0, 1).float()


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Mean over the classes that there are of |predicted and true| / |predicted or true|, int64 [n] each (VOC's score)."""
    table = torch.bincount(truth * CLASSES + predicted, minlength=CLASSES**2).view(CLASSES, CLASSES).double()
    both, union = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    there = union > 0
    return (both[there] / union[there]).mean().item()
