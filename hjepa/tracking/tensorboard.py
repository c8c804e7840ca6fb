"""TensorBoard: event files in the run folder's `tensorboard/`.

Every session of a run writes the event files from the start, so that no point is duplicated. Pictures and metrics that a task
adds to a finished run are in event files of their own, which the same task replaces.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hjepa.config.errors import import_optional
from hjepa.tracking.histograms import histogram_files, read_histograms
from hjepa.tracking.run_folder import Record
from hjepa.tracking.tracker import Artifacts, Tracker


class TensorBoard(Tracker):
    """TensorBoard event files in the run folder."""

    def __init__(self) -> None:
        import_optional("tensorboard", "tracking=tensorboard", "use tracking=none")
        self.folder, self.last_step = Path(), 0
        self.writer: Any = None

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        self.folder = folder / "tensorboard"
        for file in self.folder.glob("events.out.tfevents.*"):
            if file.suffix[1:].isdecimal():  # of an earlier session; the names of the files that a task adds end with a word
                file.unlink()
        self.writer = self.open()
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in (params | tags).items()))
        for record in records:
            self.log(record)
        for file in histogram_files(folder):
            self.log_histograms(file)
        return None

    def open(self, suffix: str = "") -> Any:
        """Return a writer of a new event file, whose name has this suffix."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), filename_suffix=suffix)

    def log(self, record: Record) -> None:
        self.last_step = record["step"]
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, self.last_step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if path.suffix == ".png":
            add_picture(self.writer, path, folder, self.last_step)

    def log_histograms(self, file: Path) -> None:
        step, histograms = read_histograms(file)
        for name, (counts, edges) in histograms:
            centers = (edges[1:] + edges[:-1]) / 2
            moments = (counts * centers).sum(), (counts * centers**2).sum()
            self.writer.add_histogram_raw(
                name, edges[0], edges[-1], counts.sum(), *moments, edges[1:].tolist(), counts.tolist(), step
            )

    def finish(self, status: str) -> bool:
        self.writer.close()
        return True

    def add_artifacts(self, run_id: str, artifacts: Artifacts) -> None:
        if not artifacts.run:
            return
        self.folder = artifacts.run / "tensorboard"
        parts = {path.stem: [path] for path in artifacts.files if path.suffix == ".png"} | {"metrics": []}
        for part, pictures in parts.items():
            suffix = f".{artifacts.folder}.{part}"
            for earlier in self.folder.glob(f"*{suffix}"):
                earlier.unlink()
            writer = self.open(suffix)
            for path in pictures:
                add_picture(writer, path, artifacts.folder, artifacts.step)
            for key, value in () if pictures else artifacts.metrics.items():
                writer.add_scalar(key, value, artifacts.step)
            writer.close()

    def view_command(self) -> str | None:
        logdir = shlex.quote(str(self.folder.parents[1]))
        return f"{shlex.quote(sys.executable)} -m tensorboard.main --logdir {logdir} --host localhost"


def add_picture(writer: Any, path: Path, folder: str | None, step: int) -> None:
    """Add a PNG file as the image FOLDER/NAME."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    writer.add_image(f"{folder or 'pictures'}/{path.stem}", pixels, step, dataformats="HWC")
