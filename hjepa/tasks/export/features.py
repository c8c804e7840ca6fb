"""`task=features run=... task.images=FOLDER task.out=FILE`: the features of every image in a folder, in batches that workers
decode ahead. The images are read as in training: resized, center-cropped, the unreadable ones named and, up to a share, left out.
"""

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.data.image_files import CorruptFiles, ImageFiles, walk_images
from hjepa.data.stream import Stream
from hjepa.metrics.probes import extract
from hjepa.tasks.export.writers import STORES, Add, listing
from hjepa.tasks.trained_run import TrainedRun, load_run
from hjepa.tracking.run_folder import check_writable
from hjepa.training.signals import StopFlag


def export_features(
    config: Config,
    path: Path,
    images: str,
    out: str,
    batch_size: int,
    max_corrupt: float,
    workers: int | None,
    checkpoint: str | None,
) -> None:
    """Write the features [F] of the probe protocol of all images below a folder.

    Args:
        images: the folder; out: .npy file (float32 [N, F], with a list of paths beside it) or .parquet file (columns path and
            feature); paths are relative to the folder.
        max_corrupt: share of unreadable images that are left out; more end it.
        workers: see `hjepa.data.stream.Stream`; checkpoint: see `hjepa.tasks.trained_run.load_run`.

    Raises:
        UserError: there are no images, too many cannot be read, `out` cannot be written, or Ctrl-C.
    """
    if batch_size < 1 or not 0 <= max_corrupt <= 1 or (workers is not None and workers < 0):
        raise UserError(
            f"task.batch_size={batch_size}, task.max_corrupt={max_corrupt}, task.workers={workers}: expected at least 1, a share "
            "between 0 and 1, and at least 0 or null."
        )
    folder, target = Path(images).expanduser().absolute(), Path(out).expanduser().absolute()
    check_output_path(target)
    paths = find(folder, target)
    run = load_run(config, checkpoint, None)
    corrupt = CorruptFiles(len(paths), max_corrupt, "task", "they are left out")
    files = ImageFiles(
        np.array([os.fsencode(path) for path in paths]),
        torch.zeros(len(paths), dtype=torch.int64),
        run.encoder.image_size,
        corrupt,
        workers,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with StopFlag() as stop, STORES[target.suffix](target, run.encoder.feature_dim) as add:
        write(run, files, folder, batch_size, add, stop)
    print(f"{len(paths) - len(corrupt.names)} images, {run.encoder.feature_dim} features each, from {run.checkpoint}")
    if target.suffix == ".npy":
        print(f"Files: {listing(target)}")
    print(f"Features: {target}", flush=True)


def check_output_path(target: Path) -> None:
    """Refuse a file that cannot be written, or of an unknown kind."""
    if target.suffix not in STORES:
        raise UserError(f"task.out={target}: the kind of file is unknown; let it end in {' or '.join(STORES)}.")
    if target.is_dir():
        raise UserError(f"task.out={target} is a folder; give the name of a file.")
    check_writable(target.parent, "give another task.out")


def find(folder: Path, target: Path) -> list[str]:
    """All images below a folder."""
    if not folder.is_dir():
        raise UserError(f"task.images={folder} is not a folder; give one that holds images, in any folders.")
    paths = walk_images(folder)
    if not paths:
        raise UserError(f"task.images={folder} holds no images, nor do the folders in it; give one that does.")
    broken = next((path for path in paths if "\n" in path), None)
    if broken and target.suffix == ".npy":
        raise UserError(f"The name {broken!r} breaks the list of files, which has one a line; rename it, or write .parquet.")
    return paths


def write(run: TrainedRun, files: ImageFiles, folder: Path, batch_size: int, add: Add, stop: StopFlag) -> None:
    """Compute and add the features of all files, in batches."""
    positions = torch.arange(len(files)).split(batch_size)
    stream = Stream(files, lambda step: positions[step], len(positions), run.hardware.device)
    with closing(stream), tqdm(total=len(files), desc="features", unit="image", disable=None) as bar:
        for step, batch in enumerate(positions):
            pixels = stream.batch(step)
            paths = [files.path(position) for position in batch.tolist()]
            readable = [path not in files.corrupt.names for path in paths]
            features = extract(run.encoder, pixels, run.dataset.normalize, batch_size).cpu().numpy()
            kept = [os.path.relpath(path, folder) for path, good in zip(paths, readable, strict=True) if good]
            add(kept, features[readable])
            bar.update(len(batch))
            if stop:
                done = f"{int(batch[-1]) + 1} of {len(files)} images"
                raise UserError(f"Interrupted after {done}: nothing is written; the same command starts anew.")
