"""Weights & Biases: online, or offline in the run folder's `wandb/`, to be uploaded with `wandb sync`."""

import os
import shlex
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

from hjepa.config.errors import UserError, import_optional
from hjepa.config.identity import config_hash, flatten
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.histograms import histogram_files, read_histograms
from hjepa.tracking.run_folder import Record, is_copy, read_config, read_records, try_lock
from hjepa.tracking.run_name import display_name
from hjepa.tracking.tracker import Artifacts, Tracker, tracker_status


class Wandb(Tracker):
    """A run of Weights & Biases, which is resumed under the same id.

    Args:
        mode: "online" (needs `wandb login`) or "offline". Offline, every session writes the run from the start. None: the
            environment variable WANDB_MODE or, if that is not set, online.
        project: Name of the project. None: the environment variable WANDB_PROJECT or, if that is not set, the name of the
            experiment.
        system_metrics: Record the use of CPU, memory and GPU.
    """

    def __init__(self, mode: Literal["online", "offline"] | None, project: str | None, system_metrics: bool) -> None:
        self.mode = mode or os.environ.get("WANDB_MODE") or "online"
        self.project, self.system_metrics = project or os.environ.get("WANDB_PROJECT"), system_metrics
        self.wandb = import_optional("wandb", "tracking=wandb", "use tracking=none")
        self.run: Any = None
        self.folder = Path()
        self.first_step = 0  # the resumed run already has the records before this step
        self.last_step = 0

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        self.folder = folder / "wandb"
        for earlier_session in self.folder.glob("offline-run-*"):
            shutil.rmtree(earlier_session)
        self.folder.mkdir(exist_ok=True)
        self.run = self.wandb.init(
            project=self.project or experiment,
            id=self.take_id(folder),
            name=display_name(folder, params, tags),
            dir=str(folder),
            config=params | tags,
            mode=self.mode,
            resume=None if self.mode == "offline" else "allow",
            settings=self.wandb.Settings(
                console="off",
                silent=True,
                x_disable_meta=True,  # it contains the command, in which addresses may have passwords
                x_disable_stats=not self.system_metrics,
            ),
        )
        self.first_step = self.run.step
        histograms = {int(file.stem): file for file in histogram_files(folder)}  # W&B takes values in the order of their steps
        for record in records:
            self.log(record)
            if file := histograms.get(record["step"]):
                self.log_histograms(file)
        return None

    def take_id(self, folder: Path) -> str:
        """Return the id of the run, a new one for the first session and for a copy of a run folder."""
        id_file, folder_file = self.folder / "id", self.folder / "folder"  # which names the run folder that has the id
        is_copied = folder_file.exists() and is_copy(folder, Path(folder_file.read_text()), "wandb/id")
        if not id_file.exists() or is_copied:
            atomic_write(id_file, uuid.uuid4().hex)
        atomic_write(folder_file, str(folder))
        return id_file.read_text()

    def log(self, record: Record) -> None:
        self.last_step = record["step"]
        self.log_values({key: value for key, value in record.items() if key != "step"})

    def log_values(self, values: dict[str, Any]) -> None:
        """Log values of the last step, unless the resumed run already has them."""
        if self.last_step >= self.first_step:
            self.run.log(values, step=self.last_step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if path.suffix == ".png":
            step = max(self.first_step, self.last_step)
            self.run.log({f"{folder or 'pictures'}/{path.stem}": self.wandb.Image(str(path))}, step=step)

    def log_histograms(self, file: Path) -> None:
        _, histograms = read_histograms(file)
        self.log_values({name: self.wandb.Histogram(np_histogram=tuple(histogram)) for name, histogram in histograms})

    def finish(self, status: str) -> bool:
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)
        return True

    def add_artifacts(self, run_id: str, artifacts: Artifacts) -> None:
        if not artifacts.run:
            return
        with try_lock(artifacts.run) as is_free:
            if not is_free:
                raise UserError("the run is still going on; repeat the command when it has ended")
            self.write_anew(artifacts.run, artifacts)

    def write_anew(self, run: Path, artifacts: Artifacts) -> None:
        """Resume a finished run, or offline write it anew, and add artifacts to it."""
        config = read_config(run)
        tags = {"config": config_hash(config)}
        self.start(run, config["experiment_name"], flatten(config), tags, read_records(run))
        for path in sorted((run / "plots").glob("*.png")) if self.mode == "offline" else ():  # written anew as well
            self.log_artifact(path, "plots")
        for path in artifacts.files:
            self.log_artifact(path, artifacts.folder)
        self.run.summary.update(artifacts.metrics)
        self.finish(tracker_status(run))

    def view_command(self) -> str | None:
        if self.mode == "offline":
            return f"wandb sync {shlex.quote(str(self.folder))}/offline-run-*"
        return f"the address {self.run.url} into a browser" if self.run.url else None
