"""`task=export run=...`: write the encoder of a run to files that can be used without hjepa, in the folder `export/` of the run.

Every format is loaded from its files and compared with the encoder of the run, on batches of several sizes. If any output
differs by more than the tolerance, nothing is exported and an earlier export stays as it was.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.config.terminal import progress_bar
from hjepa.config.types import PositiveFloat
from hjepa.distributed.seeding import generator
from hjepa.models.encoder import Encoder
from hjepa.tasks.export.formats import FORMATS, EncoderFunction, check_packages, default_formats
from hjepa.tasks.export.readme import render_readme
from hjepa.tasks.trained_run import TrainedRun, load_run
from hjepa.tracking.atomic import atomic_folder
from hjepa.tracking.provenance import git_state
from hjepa.tracking.run_folder import check_writable
from hjepa.tracking.tracker import Artifacts, log_artifacts, register_model
from hjepa.training.signals import StopFlag

log = logging.getLogger(__name__)

COMPARED_BATCH_SIZES = (1, 3, 8)


def export_encoder(
    config: Config,
    path: Path,
    formats: list[Literal["timm", "onnx", "torch_export"]] | None,
    tolerance: PositiveFloat,
    checkpoint: str | None,
    root: str | None,
) -> None:
    """Export the encoder of the run in one or several formats, on the CPU and in float32.

    Args:
        config: Resolved config, whose `run` names the run folder.
        path: Not used.
        formats: Formats to write. None: timm, or torch_export if timm has no models of this kind.
        tolerance: Largest difference from the outputs of the run's encoder, relative to their largest absolute value.
        checkpoint: See `hjepa.tasks.trained_run.load_run`.
        root: See `hjepa.tasks.trained_run.load_run`.

    Raises:
        UserError: If a format requires a package that is not installed, or its outputs differ by more than the tolerance.
    """
    if formats == []:
        raise UserError(f"task.formats=[]: expected at least one of {', '.join(FORMATS)}.")
    check_packages(formats or [])
    register = config["tracking"].get("mlflow", {}).get("register")
    if register and "onnx" not in (formats or []):
        raise UserError(f"tracking.mlflow.register={register} registers an ONNX file; set task.formats=[onnx], or with others.")
    config = config | {"hardware": config["hardware"] | {"device": "cpu", "precision": "float32"}}
    run = load_run(config, checkpoint, root)
    names = list(dict.fromkeys(formats or default_formats(run.encoder)))
    folder = run.folder / "export"
    check_writable(folder, "copy the run to a folder that can be written, and set run=COPY")
    pixels, image_source = comparison_images(run, root)
    images = run.dataset.normalize(pixels)
    with StopFlag() as stop, atomic_folder(folder) as temporary, torch.no_grad():
        differences: dict[str, float] = {}
        for name in progress_bar(names, desc="exporting", unit="format"):
            differences[name] = export_format(run, name, images, temporary, tolerance)
            if stop:
                raise UserError(f"Interrupted: nothing is exported, {folder} is unchanged; repeat the command to start again.")
        summary = build_summary(run, differences, image_source, temporary)
        (temporary / "preprocess.json").write_text(json.dumps(preprocessing(run), indent=2) + "\n")
        (temporary / "README.md").write_text(render_readme(summary, preprocessing(run), temporary, run.encoder))
        (temporary / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    log_artifacts(config, run.folder, Artifacts(sorted(folder.iterdir()), "export"))
    print_summary(summary, folder)
    if register:
        print(f"Registered in MLflow: {register_model(config, run.folder)}", flush=True)


def comparison_images(run: TrainedRun, root: str | None) -> tuple[Tensor, str]:
    """Return images uint8 [N, 3, S, S] on which outputs are compared, and a description of them.

    They are images of the dataset or, if the dataset is not on this machine, random ones.
    """
    try:
        return run.dataset.sample(max(COMPARED_BATCH_SIZES)), "images of the dataset"
    except UserError as error:
        if root:
            raise
        log.warning("The images of the run were not found, outputs are compared on random images (%s)", error)
    size = run.encoder.image_size
    shape = (max(COMPARED_BATCH_SIZES), 3, size, size)
    return torch.randint(256, shape, generator=generator(0, "export"), dtype=torch.uint8), "random images"


def export_format(run: TrainedRun, name: str, images: Tensor, folder: Path, tolerance: float) -> float:
    """Export one format, load it, and return its relative difference from the encoder of the run.

    Raises:
        UserError: If the difference exceeds the tolerance.
    """
    FORMATS[name].export(run, images[:2], folder)
    difference = relative_difference(FORMATS[name].load(folder), run.encoder, images)
    if not difference <= tolerance:
        raise UserError(
            f"task.formats: {name} is not faithful: its outputs differ from those of the run by {difference:.2g} of their "
            f"largest value, more than task.tolerance={tolerance:g}; nothing is exported. Omit {name}, or increase the tolerance."
        )
    return difference


def relative_difference(function: EncoderFunction, encoder: Encoder, images: Tensor) -> float:
    """Return the largest difference between the outputs of an exported encoder and the original.

    It is the largest over features, tokens and the batch sizes, relative to the largest absolute value of the original. It is
    infinite if shapes differ, and NaN if any output is NaN.
    """
    largest = torch.tensor(0.0)
    for size in COMPARED_BATCH_SIZES:
        batch = images[:size]
        expected_outputs = (encoder.features(batch), encoder(batch)[-1].tokens)
        for actual, expected in zip(function(batch), expected_outputs, strict=True):
            if actual.shape != expected.shape:
                return float("inf")
            largest = torch.maximum(largest, (actual - expected).abs().max() / expected.abs().max())  # propagates NaN
    return largest.item()


def preprocessing(run: TrainedRun) -> dict[str, Any]:
    """Return the preprocessing of image files, which is that of training without augmentation."""
    background = run.dataset.background
    return {
        "image_size": run.encoder.image_size,
        "color": "RGB; 16-bit values are divided by 257, and color profiles are ignored",
        "orientation": "rotated and flipped as the metadata of the file (EXIF) say",
        "background": None if background is None else list(background),
        "transparency": "ignored, colors under it show" if background is None else "composited onto the background",
        "resize": "shorter side to image_size, bilinear, antialiased",
        "crop": "center",
        "scale": "pixels to [0, 1], then (pixel - mean) / std per channel",
        "mean": run.config["dataset"]["mean"],
        "std": run.config["dataset"]["std"],
        "jpeg": "hjepa decodes JPEG files that are several times larger at a reduced size (PIL's Image.draft), which is faster "
        "and changes their features slightly",
    }


def build_summary(run: TrainedRun, differences: dict[str, float], image_source: str, folder: Path) -> dict[str, Any]:
    """Return the content of summary.json."""
    return {
        "status": "finished",
        "run": run.folder.name,
        "checkpoint": run.checkpoint.name,
        "checkpoint_hash": run.hash,
        "step": run.step,
        "feature_dim": run.encoder.feature_dim,
        "feature_layers": [f"{run.encoder.layer_name} {layer}" for layer in run.encoder.feature_layers],
        "tokens": {
            "summary": run.encoder.num_summary_tokens,
            "patches": run.encoder.grid**2,
            "dim": run.encoder.layer_dims[-1],
        },
        "compared_on": image_source,
        "difference": differences,
        "megabytes": {file.name: file.stat().st_size / 1e6 for file in sorted(folder.iterdir()) if file.suffix != ".json"},
        **git_state(),
    }


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print the differences and file sizes."""
    print(f"{summary['run']} at {summary['checkpoint']} (step {summary['step']}), compared on {summary['compared_on']}:")
    for name, difference in summary["difference"].items():
        print(f"  {name:<14}differs from the outputs of the run by {difference:.1e} of their largest value")
    for name, size in summary["megabytes"].items():
        print(f"  {name:<26}{size:8.1f} MB")
    print(f"How to use them: {folder / 'README.md'}")
    print(f"Export folder: {folder}", flush=True)
