"""`task=features run=... task.images=FOLDER task.out=FILE`: write the features of every image below a folder.

Workers decode the images ahead, in batches, as in training: resized and center-cropped. Unreadable images are reported and, up
to `max_corrupt` of all images, left out.
"""

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.config.terminal import progress_bar
from hjepa.config.types import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from hjepa.data.file_lists import walk_images
from hjepa.data.image_files import CorruptFiles, ImageFiles
from hjepa.data.sources import FilePaths
from hjepa.data.stream import Stream
from hjepa.data.workers import Interrupted
from hjepa.metrics.probes import extract_features
from hjepa.tasks.export.writers import WRITERS, AppendRows, paths_file
from hjepa.tasks.trained_run import TrainedRun, load_run
from hjepa.tracking.run_folder import check_writable
from hjepa.training.signals import StopFlag


def export_features(
    config: Config,
    path: Path,
    images: str,
    out: str,
    batch_size: PositiveInt,
    max_corrupt: Fraction,
    max_megapixels: PositiveFloat,
    workers: NonNegativeInt | None,
    checkpoint: str | None,
) -> None:
    """Write the features [F] of all images below a folder, the same features that the probes use.

    Args:
        config: Resolved config, whose `run` names the run folder.
        path: Not used.
        images: Folder of the images, searched recursively.
        out: Output file, either .npy (float32 [N, F], with a list of paths beside it) or .parquet (columns path and feature).
            The paths are relative to the folder of the images.
        batch_size: Number of images per forward pass.
        max_corrupt: Largest fraction of unreadable images that may be left out; more raise an error.
        max_megapixels: Size in millions of pixels above which images are not decoded.
        workers: See `hjepa.data.stream.Stream`.
        checkpoint: See `hjepa.tasks.trained_run.load_run`.

    Raises:
        UserError: If the folder contains no images, too many of them cannot be read, `out` cannot be written, or Ctrl-C was
            pressed.
    """
    folder, target = Path(images).expanduser().absolute(), Path(out).expanduser().absolute()
    check_output_path(target)
    paths = find_images(folder, target)
    run = load_run(config, checkpoint, None)
    corrupt = CorruptFiles(len(paths), max_corrupt, "task", "they are left out")
    files = ImageFiles(
        FilePaths(np.array([os.fsencode(path) for path in paths])),
        torch.zeros(len(paths), dtype=torch.int64),
        run.encoder.image_size,
        corrupt,
        workers,
        run.dataset.background,
        max_megapixels,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with StopFlag() as stop, WRITERS[target.suffix](target, run.encoder.feature_dim) as append:
        write_features(run, files, folder, batch_size, append, stop)
    print(f"{len(paths) - len(corrupt.names)} images, {run.encoder.feature_dim} features each, from {run.checkpoint}")
    if target.suffix == ".npy":
        print(f"Files: {paths_file(target)}")
    print(f"Features: {target}", flush=True)


def check_output_path(target: Path) -> None:
    """Raise `UserError` if the output file has an unknown suffix or cannot be written."""
    if target.suffix not in WRITERS:
        raise UserError(f"task.out={target}: unknown kind of file; expected a name that ends in {' or '.join(WRITERS)}.")
    if target.is_dir():
        raise UserError(f"task.out={target} is a folder; expected the name of a file.")
    check_writable(target.parent, "set another task.out")


def find_images(folder: Path, target: Path) -> list[str]:
    """Return the paths of all images below a folder.

    Raises:
        UserError: If there are none, or the list of paths beside an .npy file cannot represent one of them.
    """
    if not folder.is_dir():
        raise UserError(f"task.images={folder} is not a folder; set it to a folder of images, which may have subfolders.")
    paths = walk_images(folder)
    if not paths:
        raise UserError(f"task.images={folder} contains no images, nor do its subfolders; set it to a folder that does.")
    multiline = next((path for path in paths if "\n" in path), None)
    if multiline and target.suffix == ".npy":
        raise UserError(
            f"The file name {multiline!r} contains a line break, and the list of paths has one path per line; rename it, or "
            "write .parquet."
        )
    return paths


def write_features(run: TrainedRun, files: ImageFiles, folder: Path, batch_size: int, append: AppendRows, stop: StopFlag) -> None:
    """Compute the features of all readable files in batches and append them to the output."""
    batches = torch.arange(len(files)).split(batch_size)
    stream = Stream(files, lambda step: batches[step], batch_size, len(batches), run.hardware.device)
    done = 0
    try:
        with closing(stream), progress_bar(total=len(files), desc="extracting features", unit="image") as bar:
            decoded = (stream.batch(step, stop) for step in range(len(batches)))
            for batch, features in zip(batches, extract_features(run.encoder, decoded, run.dataset.normalize), strict=True):
                paths = [files.name(position) for position in batch.tolist()]
                readable = [path not in files.corrupt.names for path in paths]
                names = [os.path.relpath(path, folder) for path, ok in zip(paths, readable, strict=True) if ok]
                append(names, features.cpu().numpy()[readable])
                bar.update(len(batch))
                done += len(batch)
                if stop:
                    raise Interrupted
    except Interrupted:
        message = f"Interrupted after {done} of {len(files)} images: nothing is written; repeat the command to start again."
        raise UserError(message) from None
