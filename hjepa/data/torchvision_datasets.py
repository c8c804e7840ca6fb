"""Datasets that torchvision downloads."""

import tarfile
from typing import Literal

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import functional as TF

from hjepa.config.errors import UserError
from hjepa.data.datamodule import DataModule, Split


class TorchvisionDataset(DataModule):
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision, downloaded and checked on first use.

    Args:
        name: the class in torchvision.datasets; root: where the download goes.
    """

    def __init__(self, name: Literal["CIFAR10", "CIFAR100", "STL10"], root: str, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.name, self.root = name, root
        self.names: list[str] = []  # known once the files are there

    def load(self, split: Literal["train", "test"]) -> Split:
        try:
            if self.name == "STL10":  # its unlabeled images (-1) are for training too
                data = datasets.STL10(self.root, split="train+unlabeled" if split == "train" else "test", download=True)
                pixels, labels = torch.from_numpy(data.data), torch.from_numpy(data.labels).long()
            else:
                data = getattr(datasets, self.name)(self.root, train=split == "train", download=True)
                pixels, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(
                f"{self.name} could not be downloaded to or read from dataset.root={self.root} ({error}); check the network, "
                "the folder and its space, or put the archive there by hand."
            ) from error
        self.names = list(data.classes)
        return Split(resize(pixels.contiguous(), self.image_size), {"class": labels})

    def class_names(self, label: str) -> list[str]:
        return self.names


def resize(images: Tensor, size: int, chunk: int = 1024) -> Tensor:
    """uint8 [N, 3, S, S] -> [N, 3, size, size], antialiased, in chunks to bound memory."""
    if images.shape[-1] == size:
        return images
    return torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(chunk)])
