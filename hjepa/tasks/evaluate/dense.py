"""Dense accuracy: do the patch tokens tell which part, or the background, a patch shows?

Only for `dataset=shapes`, where the part at every pixel is known by construction.
"""

from dataclasses import dataclass

import torch
from sklearn.metrics import jaccard_score
from torch import Tensor

from hjepa.config.errors import NotApplicable
from hjepa.config.terminal import progress_bar
from hjepa.config.types import PositiveFloat, PositiveFraction, PositiveInt
from hjepa.data.datamodule import to_unit_range
from hjepa.data.shapes import PARTS, Shapes
from hjepa.metrics.probes import accuracy, logistic, standardize
from hjepa.models.layers import patchify
from hjepa.tasks.evaluate.features import LabeledImages, Subset
from hjepa.tasks.evaluate.protocol import EvalContext, EvalProtocol, Scores
from hjepa.tasks.trained_run import NetworkKind

NUM_CLASSES = 1 + len(PARTS)  # class 0 is the background


@dataclass(frozen=True)
class DenseProbe(EvalProtocol):
    """Logistic regression on the patch tokens of every layer, and on the pixels of the patches.

    The tokens of a layer with a finer grid are averaged over each patch.

    Args:
        train_images: Largest number of images to fit to; all of their patches are used.
        test_images: Largest number of images to score on; all of their patches are used.
        coverage: Fraction of a patch that a part must cover to be the label of the patch.
        penalty: L2 penalty.
    """

    train_images: PositiveInt
    test_images: PositiveInt
    coverage: PositiveFraction
    penalty: PositiveFloat

    def check(self, context: EvalContext) -> None:
        if not isinstance(context.data.dataset, Shapes):
            raise NotApplicable(
                "protocol=[dense] is for runs on dataset=shapes, where the part that every patch shows is known; leave it out."
            )

    def describe(self, context: EvalContext) -> str:
        counts = {subset: len(images) for subset, images in self.images(context).items()}
        background = (self.patch_labels(context)["test"] == 0).double().mean().item()
        return (
            f"Dense: which part a patch shows, by a linear probe of the patches of {counts['train']} images, scored on those of "
            f"{counts['test']} {context.data.test} images ({background:.1%} of them show the background)"
        )

    def score(self, context: EvalContext) -> Scores:
        scores: Scores = {}
        run, images, labels = context.run, self.images(context), self.patch_labels(context)
        layers = [layer for layer in context.features.layers() if not layer.startswith("stacked")]
        networks = context.features.networks
        progress = progress_bar(total=len(networks) * len(layers) + 1, desc="scoring dense", unit="source")
        for kind in networks:
            for layer in layers:
                tokens = {subset: patch_tokens(context, kind, layer, images[subset]) for subset in images}
                scores[f"{kind}/{layer}"] = self.score_patches(tokens, labels)
                progress.update()
        pixels = {subset: to_unit_range(chosen.split.images[chosen.index]) for subset, chosen in images.items()}
        size, device = run.encoder.patch_size, run.hardware.device
        patches = {subset: patchify(values, size).flatten(0, 1).to(device) for subset, values in pixels.items()}
        scores["pixels"] = self.score_patches(patches, labels)
        progress.update()
        progress.close()
        return scores

    def images(self, context: EvalContext) -> dict[Subset, LabeledImages]:
        """Return the images whose patches are used."""
        limits: dict[Subset, int] = {"train": self.train_images, "test": self.test_images}
        subsets = context.data.subsets
        return {subset: LabeledImages(images.split, images.index[: limits[subset]]) for subset, images in subsets.items()}

    def patch_labels(self, context: EvalContext) -> dict[Subset, Tensor]:
        """Return the classes of the patches of these images, int64 [n * patches]."""
        dataset, size = context.data.dataset, context.run.encoder.patch_size
        assert isinstance(dataset, Shapes)
        train_split = dataset.patch_parts("train", size, self.coverage)
        train, validation = dataset.split_indices(dataset.load("train").labels["part"])
        scored = (
            train_split[validation] if context.data.test == "validation" else dataset.patch_parts("test", size, self.coverage)
        )
        labels: dict[Subset, Tensor] = {"train": train_split[train], "test": scored}
        device = context.run.hardware.device
        return {subset: labels[subset][images.index].flatten().to(device) for subset, images in self.images(context).items()}

    def score_patches(self, patches: dict[Subset, Tensor], labels: dict[Subset, Tensor]) -> dict[str, float]:
        """Return accuracy and mean intersection over union (the VOC score) of patches [n, F]."""
        x, y = standardize(patches["train"], patches["test"])
        logits = logistic(x, labels["train"], NUM_CLASSES, self.penalty)(y)
        miou = jaccard_score(labels["test"].cpu(), logits.argmax(1).cpu(), average="macro")
        return {"accuracy": accuracy(logits, labels["test"]), "miou": float(miou)}


def patch_tokens(context: EvalContext, kind: NetworkKind, layer: str, images: LabeledImages) -> Tensor:
    """Return the patch tokens [n * patches, D] of a layer, image by image in raster order; finer cells are averaged."""
    grid, device = context.run.encoder.grid, context.run.hardware.device
    batches = images.batches(context.features.batch_size, device, f"extracting features ({kind}, {layer})")
    network, normalize = context.features.networks[kind], context.run.dataset.normalize
    return torch.cat([network.tokens(normalize(batch))[layer].cells_on(grid) for batch in batches]).flatten(0, 1).float()
