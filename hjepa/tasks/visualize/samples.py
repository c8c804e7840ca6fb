"""The data that the pictures of a run share: the run, held-out images, and their features.

A picture is a function of `Samples` that returns the paths of the files it has drawn; `hjepa.tasks.visualize.visualize` lists
all pictures and says how to add one.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hjepa.config.terminal import progress_bar
from hjepa.data.datamodule import Split, evenly_spaced_indices, to_unit_range
from hjepa.metrics.probes import extract_features, subset
from hjepa.tasks.trained_run import LayerFeatures, LayerTokens, NetworkKind, TrainedRun, layer_features

BATCH_SIZE = 64  # images per forward pass


@dataclass(frozen=True)
class Samples:
    """A run and held-out images to show and to search.

    Attributes:
        run: Run at a checkpoint.
        folder: Folder of the pictures.
        split: Held-out images, from the validation part.
        num_shown: Number of images in the rows of a picture.
    """

    run: TrainedRun
    folder: Path
    split: Split
    num_shown: int

    @cached_property
    def networks(self) -> dict[NetworkKind, LayerFeatures]:
        """The layers of the trained and of the untrained network."""
        return layer_features(self.run, self.run.model.layers)

    @property
    def layers(self) -> list[str]:
        """Names of the layers, including the one that stands for all layers if the features consist of all."""
        return self.networks["trained"].names()

    @property
    def single_layers(self) -> list[str]:
        """Names of the layers without the one that stands for all layers."""
        return self.networks["trained"].single_names()

    @cached_property
    def pixels(self) -> Tensor:
        """All held-out images, uint8 [N, 3, S, S]."""
        return self.split.images[:]

    @cached_property
    def labels(self) -> Tensor | None:
        """The main label of all held-out images, int64 [N], -1 where unknown; None without labels."""
        return next(iter(self.split.labels.values()), None)

    @property
    def shown(self) -> Tensor:
        """Evenly spaced positions of the B images to show, int64 [B]."""
        return evenly_spaced_indices(len(self.pixels), self.num_shown)

    @property
    def images(self) -> Tensor:
        """The images to show, float [B, 3, S, S] in [0, 1]."""
        return to_unit_range(self.pixels[self.shown])

    def normalized(self, index: Tensor) -> Tensor:
        """Return the held-out images at these positions as the network takes them."""
        return self.run.dataset.normalize(self.pixels[index].to(self.run.hardware.device))

    @cached_property
    def tokens(self) -> dict[NetworkKind, dict[str, LayerTokens]]:
        """The tokens of the images to show, by kind of network and layer."""
        return {kind: network.tokens_on_cpu(self.normalized(self.shown)) for kind, network in self.networks.items()}

    @cached_property
    def features(self) -> dict[NetworkKind, dict[str, Tensor]]:
        """Pooled features [N, F] of all held-out images, by kind of network and layer."""
        features: dict[NetworkKind, dict[str, Tensor]] = {}
        for kind, network in self.networks.items():
            description = f"extracting features ({kind})"
            batches = progress_bar(self.pixels.split(BATCH_SIZE), desc=description, unit="batch", leave=False)
            rows = list(extract_features(network, batches, self.run.dataset.normalize))
            features[kind] = {layer: torch.cat([batch[layer] for batch in rows]).cpu() for layer in self.layers}
        return features

    def path(self, picture: str, layer: str | None = None) -> Path:
        """Return the file of a picture; it contains the name of the layer if the run has several layers."""
        suffix = f"-{layer.replace(' ', '')}" if layer and len(self.layers) > 1 else ""
        return self.folder / f"{picture}{suffix}.png"


def select_samples(split: Split, count: int) -> Split:
    """Return at most `count` images of a split, only labeled ones if the split has labels."""
    return subset(split, count) if split.labels else split[evenly_spaced_indices(len(split), count)]
