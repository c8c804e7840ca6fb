"""Datasets that torchvision downloads."""

import fcntl
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import functional as TF

from hjepa.config.errors import UserError
from hjepa.data.datamodule import DataModule, Split


class TorchvisionDataset(DataModule):
    """CIFAR-10, CIFAR-100 or STL-10, downloaded and verified by torchvision on first use.

    Args:
        name: Class in `torchvision.datasets`.
        root: Folder of the download.
        **common: Options of `DataModule`.
    """

    def __init__(self, name: Literal["CIFAR10", "CIFAR100", "STL10"], root: str, **common: Any) -> None:
        super().__init__(**common)
        self.name, self.root = name, str(Path(root).expanduser())
        self.classes: list[str] = []  # read together with the images

    def load(self, split: Literal["train", "test"]) -> Split:
        try:
            with locked(Path(self.root)):
                data = self.download(split)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(
                f"{self.name} could not be downloaded to or read from dataset.root={self.root} ({error}); check the network, "
                "the folder and its free space, or copy the archive to the folder yourself."
            ) from error
        self.classes = list(data.classes)
        if self.name == "STL10":
            images, labels = torch.from_numpy(data.data), torch.from_numpy(data.labels).long()
        else:
            images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
        return Split(resize(images.contiguous(), self.image_size), {"class": labels})

    def download(self, split: Literal["train", "test"]) -> Any:
        """Return the dataset of torchvision, which downloads what is missing."""
        if self.name == "STL10":  # the unlabeled images, with label -1, are training images too
            return datasets.STL10(self.root, split="train+unlabeled" if split == "train" else "test", download=True)
        return getattr(datasets, self.name)(self.root, train=split == "train", download=True)

    def class_names(self, label: str) -> list[str]:
        return self.classes


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time download to a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # nothing can be downloaded to it
        yield
        return
    with (folder / ".download.lock").open("w") as lock:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def resize(images: Tensor, size: int, chunk_size: int = 1024) -> Tensor:
    """Resize uint8 images [N, 3, S, S] with antialiasing, in chunks that bound the memory."""
    if images.shape[-1] == size:
        return images
    return torch.cat([TF.resize(chunk, [size, size], antialias=True) for chunk in images.split(chunk_size)])
