"""Train SimCLR with a ResNet-18 of the library lightly, to compare with a recipe at equal seconds (`pip install lightly`).

    python -m benchmarks.simclr dataset.root=data/cifar10 --seconds 600 --threads 1 --seed 0

The settings are those of lightly's tutorial on SimCLR, adapted to the size of the images: batches of 256, SGD with momentum and a
cosine schedule, no blur. The network is lightly's ResNet-18 for small images. Its features are probed as those of hjepa are, on
the validation part, before and after the training.
"""

import argparse
import math
import time
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hjepa.config.instantiate import build
from hjepa.config.schema import resolve
from hjepa.training.build import build_components
from tests.helpers.runs import compose

WIDTH = 512  # of the features of a ResNet-18


class TwoViews(Dataset[list[Tensor]]):
    """Pairs of augmented views of images in memory, uint8 [N, 3, S, S]."""

    def __init__(self, images: Tensor, mean: list[float], std: list[float]) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.transform = SimCLRTransform(input_size=images.shape[-1], gaussian_blur=0.0, normalize={"mean": mean, "std": std})

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


class SimCLR(nn.Module):
    """A ResNet-18 and SimCLR's projection head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(ResNetGenerator("resnet-18").children())[:-1], nn.AdaptiveAvgPool2d(1))
        self.head = SimCLRProjectionHead(WIDTH, WIDTH, 128)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def features(self, images: Tensor) -> Tensor:
        """Return the features [B, 512] of images [B, 3, S, S]."""
        return self.backbone(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the projected features [B, 128] of images [B, 3, S, S]."""
        return self.head(self.features(images))


def train(model: SimCLR, loader: DataLoader[Any], seconds: float) -> int:
    """Train for a time, with a cosine schedule over that time, and return the number of images."""
    criterion, start, count = NTXentLoss(), time.monotonic(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=6e-2, momentum=0.9, weight_decay=5e-4)
    while True:
        for one, two in loader:
            spent = (time.monotonic() - start) / seconds
            if spent >= 1:
                return count
            optimizer.param_groups[0]["lr"] = 6e-2 * (1 + math.cos(math.pi * spent)) / 2
            loss = criterion(model(one), model(two))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += len(one)


def main() -> None:
    """Train, and print the probes of the untrained and of the trained network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="*", help="overrides of experiment=cifar10, such as dataset.root=...")
    for name, kind, default in (("--seconds", float, 600.0), ("--threads", int, 1), ("--seed", int, 0)):
        parser.add_argument(name, type=kind, default=default)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    config = resolve(compose("experiment=cifar10", "tracking=none", "hardware=cpu", *options.overrides))
    components = build_components(config)
    images, validation = components.dataset.train_and_validation()
    probe = build(config["probe"])
    parts = probe.select_images(images, validation)
    torch.manual_seed(options.seed)
    model = SimCLR()
    pairs = TwoViews(images.images[:], config["dataset"]["mean"], config["dataset"]["std"])
    loader = DataLoader(pairs, 256, shuffle=True, drop_last=True)
    print("untrained", probe(model, *parts, components.dataset.normalize), flush=True)
    count = train(model, loader, options.seconds)
    print(f"{count} images in {options.seconds:.0f} s", probe(model, *parts, components.dataset.normalize))


if __name__ == "__main__":
    main()
