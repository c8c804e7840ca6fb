"""What the pictures of a run share: the run, some held-out images to show, and features of more of them to search."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hjepa.data.datamodule import Split, spaced, unit
from hjepa.metrics.probes import subset
from hjepa.tasks.trained_run import LayerFeatures, LayerTokens, NetworkKind, TrainedRun, layer_features

PART = 64  # images per forward pass

Pooled = dict[str, dict[str, Tensor]]  # trained, untrained -> layer -> [N, F]


@dataclass(frozen=True)
class Samples:
    """A run to look at.

    Attributes:
        folder: where pictures go; shown: how many images rows of pictures show.
        held_out: the images to show and to search, of the validation part.
    """

    run: TrainedRun
    folder: Path
    held_out: Split
    shown: int

    @cached_property
    def layer_features(self) -> dict[NetworkKind, LayerFeatures]:
        """The trained and the untrained network."""
        return layer_features(self.run, self.run.model.depths)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have features of their own."""
        return self.layer_features["trained"].names()

    @cached_property
    def pixels(self) -> Tensor:
        """All held-out images, uint8 [N, 3, S, S]."""
        return self.held_out.images[:]

    @cached_property
    def label(self) -> Tensor | None:
        """The main label of all held-out images, int64 [N], -1 where unknown; None without labels."""
        return next(iter(self.held_out.labels.values()), None)

    @property
    def rows(self) -> Tensor:
        """Positions of the images to show, spread evenly."""
        return spaced(len(self.pixels), self.shown)

    @property
    def images(self) -> Tensor:
        """The images to show, float [B, 3, S, S] in [0, 1]."""
        return unit(self.pixels[self.rows])

    def normalized(self, rows: Tensor) -> Tensor:
        """Some held-out images as the network takes them."""
        return self.run.dataset.normalize(self.pixels[rows].to(self.run.hardware.device))

    @cached_property
    def tokens(self) -> dict[str, dict[str, LayerTokens]]:
        """Every layer's tokens of the images to show, by kind of network."""
        return {kind: network.tokens_on_cpu(self.normalized(self.rows)) for kind, network in self.layer_features.items()}

    @cached_property
    def features(self) -> Pooled:
        """Every layer's pooled features of all held-out images."""
        parts = torch.arange(len(self.pixels)).split(PART)
        found: Pooled = {}
        for kind, network in self.layer_features.items():
            looks = [{name: t.pooled for name, t in network.tokens_on_cpu(self.normalized(part)).items()} for part in parts]
            found[kind] = {name: torch.cat([look[name] for look in looks]) for name in self.layers}
        return found

    def path(self, kind: str, layer: str | None = None) -> Path:
        """The file of a picture, of a layer where it has several."""
        several = layer and len(self.layers) > 1
        return self.folder / (f"{kind}-{layer.replace(' ', '')}.png" if several and layer else f"{kind}.png")


def some(split: Split, count: int) -> Split:
    """At most `count` images of a split: labeled ones, where there are labels."""
    if split.labels:
        return subset(split, count)
    return split[spaced(len(split), count)]
