"""A trained encoder in Python, with the preprocessing that it was trained with.

`load_run_folder` and `load_export_folder` make a `Run` from a run folder and from the folder that `task=export` writes. They are
called by `hjepa.load`.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import functional as TF

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.config.terminal import progress_bar
from hjepa.data.datamodule import DataModule
from hjepa.data.file_lists import walk_images
from hjepa.data.image_files import read_image
from hjepa.data.pixels import WHITE, shorten, to_rgb
from hjepa.tasks.export.timm_model import load_timm_model
from hjepa.tasks.trained_run import load_run
from hjepa.tracking.run_folder import read_config, read_records, read_summary

ImageOrPath = Image.Image | str | os.PathLike[str]


class Run:
    """A trained encoder, with the config, the metrics and the preprocessing of its run.

    Args:
        folder: Run folder, or folder of an export.
        encoder: Trained encoder.
        untrained: The same encoder with its random initial weights, None if it is not known.
        encode: Function of an encoder and normalized images [B, 3, S, S] that returns features [B, F].
        image_size: Side of the images in pixels.
        mean: Mean of every channel, for pixels in [0, 1].
        std: Standard deviation of every channel.
        device: Device of the encoder.
        dataset: Dataset of the run, None if it is not known.
        background: Color behind transparent pixels, see `hjepa.data.pixels.to_rgb`.

    Attributes:
        folder (Path): Run folder, or folder of an export.
        encoder (nn.Module): Trained encoder, in evaluation mode: a module of hjepa for a run, and of timm for an export.
        untrained (nn.Module | None): The same encoder with random weights, the baseline of all probes. None for an export.
        dataset (DataModule | None): Dataset of the run: `run.dataset.load("test")` has `images` and `labels`. None for an export.
        transform (transforms.Compose): torchvision transform of a PIL image to a normalized tensor [3, S, S].
        config (DictConfig): Config of the run; empty for an export.
        summary (dict[str, Any]): Contents of `summary.json`.
        metrics (pd.DataFrame): All recorded metrics, indexed by optimizer step; empty for an export.

    Example:
        >>> run = hjepa.load("outputs/default/NAME")
        >>> run.features(["cat.jpg", "dog.jpg"]).shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        folder: Path,
        encoder: nn.Module,
        untrained: nn.Module | None,
        encode: Callable[[nn.Module, Tensor], Tensor],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dataset: DataModule | None = None,
        background: Sequence[int] | None = WHITE,
    ) -> None:
        self.folder, self.encoder, self.untrained, self.device = folder, encoder, untrained, device
        self.image_size, self.dataset, self.background = image_size, dataset, background
        self._encode = encode
        self._normalize = transforms.Normalize(list(mean), list(std))
        prepare = [partial(to_rgb, background=background), shorten]
        resize = [transforms.Resize(image_size, antialias=True), transforms.CenterCrop(image_size)]
        self._resize = transforms.Compose([*map(transforms.Lambda, prepare), *resize])
        self.transform = transforms.Compose([*self._resize.transforms, transforms.ToTensor(), self._normalize])
        self.config: DictConfig = OmegaConf.create(read_config(folder) if (folder / "config.yaml").exists() else {})
        self.summary: dict[str, Any] = read_summary(folder)
        self.metrics = read_metrics(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {type(self.encoder).__name__}, image_size={self.image_size}, device={self.device})"

    @overload
    def features(  # type: ignore[overload-overlap]  # a str is a sequence, too
        self, images: str | os.PathLike[str], batch_size: int = ..., *, untrained: bool = ..., normalized: bool = ...
    ) -> pd.DataFrame: ...

    @overload
    def features(
        self, images: Tensor | Sequence[ImageOrPath], batch_size: int = ..., *, untrained: bool = ..., normalized: bool = ...
    ) -> Tensor: ...

    def features(
        self,
        images: Tensor | Sequence[ImageOrPath] | str | os.PathLike[str],
        batch_size: int = 64,
        *,
        untrained: bool = False,
        normalized: bool = False,
    ) -> Tensor | pd.DataFrame:
        """Return the features of images, the ones that the probes and `task=features` use.

        Image files and PIL images are turned upright by their metadata (EXIF), images of another size are resized by their
        shorter side and center-cropped, and transparent images are composited onto the background, as in training.

        Args:
            images: One of

                - a tensor [N, 3, H, W]: uint8 pixels, or float pixels in [0, 1];
                - a list of PIL images and paths of image files;
                - the path of a folder, which is searched recursively. Unreadable images are left out with a warning.
            batch_size: Number of images per forward pass.
            untrained: Use the encoder with random weights, the baseline of all probes.
            normalized: The tensor holds outputs of `transform` instead of pixels.

        Returns:
            Float tensor [N, F] on the CPU; for a folder, a pandas DataFrame with one row per image, indexed by the path relative
            to the folder.

        Raises:
            UserError: If the images cannot be used, or the encoder before training is not known.

        Example:
            >>> run.features(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
            torch.Size([8, 128])
            >>> run.features("path/to/images").loc["cats/1.jpg"]
        """
        encoder = self.untrained if untrained else self.encoder
        if encoder is None:
            raise UserError(f"{self.folder} is an export, which has no untrained encoder; load the run folder instead.")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected at least 1.")
        if isinstance(images, Tensor):
            pixels = check_tensor(images, normalized)
            return torch.cat([self._embed(encoder, part, normalized) for part in pixels.split(batch_size)])
        if isinstance(images, str | os.PathLike):
            return self._folder_features(encoder, Path(images).expanduser().absolute(), batch_size)
        images = list(images) if isinstance(images, Sequence) else []
        if not images or not all(isinstance(image, Image.Image | str | os.PathLike) for image in images):
            raise UserError(
                "images: expected a tensor [N, 3, H, W], a list of at least one PIL image or path, or the path of a folder."
            )
        features, unreadable = self._embed_all(encoder, images, batch_size)
        if unreadable:
            raise UserError(f"{len(unreadable)} of {len(images)} images cannot be read: {describe(unreadable)}.")
        return features

    def _folder_features(self, encoder: nn.Module, folder: Path, batch_size: int) -> pd.DataFrame:
        """Return the features of all readable images below a folder, indexed by relative path."""
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; for single images, pass a list of their paths.")
        paths = walk_images(folder)
        features, unreadable = self._embed_all(encoder, paths, batch_size) if paths else (torch.empty(0, 0), {})
        if len(unreadable) == len(paths):
            raise UserError(f"{folder} contains no images that can be read{': ' if paths else ''}{describe(unreadable)}.")
        if unreadable:
            warnings.warn(f"{len(unreadable)} of {len(paths)} images are left out: {describe(unreadable)}", stacklevel=3)
        names = [os.path.relpath(path, folder) for path in paths if path not in unreadable]
        return pd.DataFrame(features.numpy(), index=pd.Index(names, dtype=object, name="path"))

    def _embed_all(self, encoder: nn.Module, images: Sequence[ImageOrPath], batch_size: int) -> tuple[Tensor, dict[str, str]]:
        """Return the features of all readable images, and for each unreadable file the reason."""
        features: list[Tensor] = []
        unreadable: dict[str, str] = {}
        bar = progress_bar(total=len(images), desc="features", unit="image", disable=len(images) <= batch_size)
        # The filters of warnings are not thread-safe, so they are set outside of the threads, in which PIL releases the lock.
        with bar, warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
            for first in range(0, len(images), batch_size):
                part = images[first : first + batch_size]
                pixels = dict(enumerate(pool.map(self._read, part)))
                unreadable |= {str(part[i]): value for i, value in pixels.items() if isinstance(value, str)}
                readable = [torch.from_numpy(value) for value in pixels.values() if not isinstance(value, str)]
                if readable:
                    features.append(self._embed(encoder, torch.stack(readable).permute(0, 3, 1, 2), False))
                bar.update(len(part))
        return torch.cat(features) if features else torch.empty(0, 0), unreadable

    def _read(self, image: ImageOrPath) -> np.ndarray | str:
        """Return the pixels uint8 [S, S, 3] of an image, or the reason why it cannot be read."""
        if isinstance(image, Image.Image):
            return np.array(self._resize(image))
        return read_image(os.fspath(image), self.image_size, self.background)

    @torch.no_grad()
    def _embed(self, encoder: nn.Module, images: Tensor, normalized: bool) -> Tensor:
        """Return the features [B, F] of one batch of uint8, float or normalized images, on the CPU."""
        size = [self.image_size, self.image_size]
        if list(images.shape[-2:]) != size and not normalized:
            images = TF.center_crop(TF.resize(images, self.image_size, antialias=True), size)
        images = images.to(self.device)
        if not normalized:
            images = self._normalize(images.float().div_(255) if images.dtype == torch.uint8 else images.float())
        return self._encode(encoder.eval(), images.float()).float().cpu()


def check_tensor(images: Tensor, normalized: bool) -> Tensor:
    """Refuse tensors that are no batch of images, or whose pixels have an unexpected range."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UserError(f"images of shape {list(images.shape)}: expected [N, 3, H, W] with at least one image.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"images of type {images.dtype}: expected torch.uint8 or a float type.")
    if normalized and images.dtype == torch.uint8:
        raise UserError("normalized=True: expected float images, as `transform` returns them, not torch.uint8.")
    if not normalized and images.is_floating_point() and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"float images with values from {images.min():.3g} to {images.max():.3g}: expected pixels in [0, 1]; pass "
            "normalized=True for outputs of `transform`."
        )
    return images


def describe(unreadable: dict[str, str]) -> str:
    """Name at most five unreadable files with their reasons."""
    named = "; ".join(f"{path} ({reason})" for path, reason in list(unreadable.items())[:5])
    return named + (f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else "")


def read_metrics(folder: Path) -> pd.DataFrame:
    """Return the metrics of a run folder, one row per optimizer step and one column per metric."""
    records = pd.DataFrame(read_records(folder))
    if records.empty:
        return pd.DataFrame(index=pd.Index([], name="step", dtype=int))
    return records.groupby("step").last()  # a step at which an epoch ends has two records


def load_run_folder(folder: Path, checkpoint: str | None, command: Config) -> Run:
    """Load a run at one of its checkpoints.

    Args:
        folder: Run folder.
        checkpoint: See `hjepa.tasks.trained_run.load_run`.
        command: Config whose `hardware` determines where to compute.
    """
    num_threads = torch.get_num_threads()
    run = load_run(command | {"run": str(folder)}, checkpoint, None)
    torch.set_num_threads(num_threads)  # which `load_run` sets for this process
    data = run.config["dataset"]

    def encode(encoder: Any, images: Tensor) -> Tensor:
        return encoder.features(images)

    size, device = run.encoder.image_size, run.hardware.device
    preprocessing = (size, data["mean"], data["std"], device, run.dataset, run.dataset.background)
    return Run(folder, run.encoder, run.untrained, encode, *preprocessing)


def load_export_folder(folder: Path, device: torch.device) -> Run:
    """Load the timm model that `task=export` wrote."""
    preprocess = {"background": None} | json.loads((folder / "preprocess.json").read_text())  # earlier exports have none
    module, features_and_tokens = load_timm_model(folder)

    def encode(encoder: Any, images: Tensor) -> Tensor:
        return features_and_tokens(encoder, images)[0]

    size, mean, std, background = (preprocess[key] for key in ("image_size", "mean", "std", "background"))
    return Run(folder, module.to(device), None, encode, size, mean, std, device, None, background)
