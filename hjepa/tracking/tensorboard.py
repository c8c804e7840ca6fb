"""TensorBoard: event files in the run folder's `tensorboard/`.

Every session of a run writes the event files from the start, so that no point is duplicated.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from hjepa.config.errors import import_optional
from hjepa.tracking.run_folder import Record
from hjepa.tracking.tracker import Tracker


class TensorBoard(Tracker):
    """TensorBoard event files in the run folder."""

    def __init__(self) -> None:
        import_optional("tensorboard", "tracking=tensorboard", "use tracking=none")
        self.folder = Path()
        self.writer: Any = None

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tensorboard"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = SummaryWriter(str(self.folder))
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in (params | tags).items()))
        for record in records:
            self.log(record)
        return None

    def log(self, record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])

    def finish(self, status: str) -> bool:
        self.writer.close()
        return True

    def view_command(self) -> str | None:
        return f"{sys.executable} -m tensorboard.main --logdir {self.folder.parents[1]} --host localhost"
