"""`task=export run=...`: the encoder of a run as files that need no hjepa, in the run's folder `export/`.

Every format is read again from its files and must give the outputs of the run's own encoder, for batches of several sizes of
the run's own images, before the folder gets its name; else nothing is left.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.distributed.seeding import generator
from hjepa.models.vit import ViTEncoder
from hjepa.tasks.export.formats import FORMATS, Function, check_packages
from hjepa.tasks.export.readme import render_readme
from hjepa.tasks.trained_run import TrainedRun, load_run
from hjepa.tracking.atomic import atomic_folder
from hjepa.tracking.provenance import git_state
from hjepa.tracking.run_folder import check_writable
from hjepa.tracking.tracker import Artifacts, log_artifacts
from hjepa.training.signals import StopFlag

log = logging.getLogger(__name__)

BATCHES = (1, 3, 8)  # sizes that are compared


def export_encoder(
    config: Config,
    path: Path,
    formats: list[Literal["timm", "onnx", "torch_export", "torchscript"]],
    tolerance: float,
    checkpoint: str | None,
    root: str | None,
) -> None:
    """Write the run's encoder in these formats, on the CPU and in float32.

    Args:
        tolerance: largest difference to the run's own outputs, relative to their largest absolute value.
        checkpoint, root: see `hjepa.tasks.trained_run.load_run`.

    Raises:
        UserError: a format needs a package that is not installed, or is not faithful.
    """
    names = list(dict.fromkeys(formats))
    if not names or not tolerance > 0:
        raise UserError(f"task.formats={names}, task.tolerance={tolerance}: expected at least one format and a positive number.")
    check_packages(names)
    config = config | {"hardware": config["hardware"] | {"device": "cpu", "precision": "float32"}}
    run = load_run(config, checkpoint, root)
    folder = run.folder / "export"
    check_writable(folder, "copy the run to where it can, and give run=COPY")
    pixels, origin = some_images(run, root)
    images = run.dataset.normalize(pixels)
    with StopFlag() as stop, atomic_folder(folder) as temporary, torch.no_grad():
        differences: dict[str, float] = {}
        for name in tqdm(names, desc="exporting", unit="format", disable=None):
            differences[name] = write_format(run, name, images, temporary, tolerance)
            if stop:
                raise UserError(f"Interrupted: nothing is exported, {folder} is as it was; the same command starts anew.")
        summary = build_summary(run, differences, origin, temporary)
        (temporary / "preprocess.json").write_text(json.dumps(preprocessing(run), indent=2) + "\n")
        (temporary / "README.md").write_text(render_readme(summary, preprocessing(run), temporary))
        (temporary / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    log_artifacts(config, run.folder, Artifacts(sorted(folder.iterdir()), "export"))
    print_summary(summary, folder)


def some_images(run: TrainedRun, root: str | None) -> tuple[Tensor, str]:
    """Images uint8 [N, 3, S, S] to compare outputs on, and what they are: the dataset's or, where it is not here, random ones."""
    try:
        return run.dataset.sample(max(BATCHES)), "images of the dataset"
    except UserError as error:
        if root:
            raise
        log.warning("The run's images are not here, random ones are compared instead (%s)", error)
    size = run.encoder.image_size
    shape = (max(BATCHES), 3, size, size)
    return torch.randint(256, shape, generator=generator(0, "export"), dtype=torch.uint8), "random images"


def write_format(run: TrainedRun, name: str, images: Tensor, folder: Path, tolerance: float) -> float:
    """Write a format, read it again; returns how far it is from the run's own outputs, or refuses it."""
    FORMATS[name].write(run, images[:2], folder)
    far = difference(FORMATS[name].read(folder), run.encoder, images)
    if not far <= tolerance:
        raise UserError(
            f"task.formats: {name} is not faithful: its outputs differ from the run's own by {far:.2g} of their largest "
            f"value, more than task.tolerance={tolerance:g}; nothing is exported. Leave {name} out, or raise the tolerance."
        )
    return far


def difference(function: Function, encoder: ViTEncoder, images: Tensor) -> float:
    """Largest difference of features or tokens to the encoder's own on batches of several sizes, relative to the largest own
    one; infinite for other shapes, NaN where either is.
    """
    worst = torch.tensor(0.0)
    for size in BATCHES:
        batch = images[:size]
        own = (encoder.features(batch), encoder(batch)[-1])
        for given, expected in zip(function(batch), own, strict=True):
            if given.shape != expected.shape:
                return float("inf")
            worst = torch.maximum(worst, (given - expected).abs().max() / expected.abs().max())  # which a NaN survives
    return worst.item()


def preprocessing(run: TrainedRun) -> dict[str, Any]:
    """What is done to an image file before the encoder gets it, as in training but for augmentation."""
    return {
        "image_size": run.encoder.image_size,
        "color": "RGB",
        "resize": "shorter side to image_size, bilinear, antialiased",
        "crop": "center",
        "scale": "pixels to [0, 1], then (pixel - mean) / std per channel",
        "mean": run.config["dataset"]["mean"],
        "std": run.config["dataset"]["std"],
        "jpeg": "hjepa lets the decoder shrink images that are several times larger (PIL's Image.draft), which is faster and "
        "changes their features a little",
    }


def build_summary(run: TrainedRun, differences: dict[str, float], origin: str, folder: Path) -> dict[str, Any]:
    """summary.json of the export."""
    return {
        "status": "finished",
        "run": run.folder.name,
        "checkpoint": run.checkpoint.name,
        "checkpoint_hash": run.hash,
        "step": run.step,
        "feature_dim": run.encoder.feature_dim,
        "tokens": {"summary": run.encoder.summary_tokens, "patches": run.encoder.grid**2},
        "compared_on": origin,
        "difference": differences,
        "megabytes": {file.name: file.stat().st_size / 1e6 for file in sorted(folder.iterdir()) if file.suffix != ".json"},
        **git_state(),
    }


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print what was exported."""
    print(f"{summary['run']} at {summary['checkpoint']} (step {summary['step']}), compared on {summary['compared_on']}:")
    for name, far in summary["difference"].items():
        print(f"  {name:<14}differs from the run's own outputs by {far:.1e} of their largest value")
    for name, size in summary["megabytes"].items():
        print(f"  {name:<26}{size:8.1f} MB")
    print(f"How to use them: {folder / 'README.md'}")
    print(f"Export folder: {folder}", flush=True)
