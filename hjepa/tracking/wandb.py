"""Weights & Biases: online, or offline in the run folder's `wandb/`, to be uploaded with `wandb sync`."""

import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

from hjepa.config.errors import import_optional
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import Record
from hjepa.tracking.tracker import Tracker


class Wandb(Tracker):
    """A run of Weights & Biases, which is resumed under the same id.

    Args:
        mode: "online" (needs `wandb login`) or "offline". Offline, every session writes the run from the start.
        project: Name of the project. None: the name of the experiment.
        system_metrics: Record the use of CPU, memory and GPU.
    """

    def __init__(self, mode: Literal["online", "offline"], project: str | None, system_metrics: bool) -> None:
        self.mode, self.project, self.system_metrics = mode, project, system_metrics
        self.wandb = import_optional("wandb", "tracking=wandb", "use tracking=none")
        self.run: Any = None
        self.folder = Path()
        self.first_step = 0  # the resumed run already has the records before this step

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        self.folder = folder / "wandb"
        for earlier_session in self.folder.glob("offline-run-*"):
            shutil.rmtree(earlier_session)
        self.folder.mkdir(exist_ok=True)
        id_file = self.folder / "id"
        if not id_file.exists():
            atomic_write(id_file, uuid.uuid4().hex)
        self.run = self.wandb.init(
            project=self.project or experiment,
            id=id_file.read_text(),
            name=folder.name,
            dir=str(folder),
            config=params | tags,
            mode=self.mode,
            resume=None if self.mode == "offline" else "allow",
            settings=self.wandb.Settings(console="off", silent=True, x_disable_stats=not self.system_metrics),
        )
        self.first_step = self.run.step
        for record in records:
            self.log(record)
        return None

    def log(self, record: Record) -> None:
        if record["step"] >= self.first_step:
            self.run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def finish(self, status: str) -> bool:
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)
        return True

    def view_command(self) -> str | None:
        if self.mode == "offline":
            return f"wandb sync {self.folder}/offline-run-*"
        return f"the address {self.run.url} into a browser"
