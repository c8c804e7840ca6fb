"""The run folder: what a run leaves behind, and the guard that one folder holds one run.

config.yaml   the resolved config        metrics.jsonl   every metric by step, the truth that trackers copy
summary.json  the machine-readable end   run.log         what was said
run_id        the tracker's run          checkpoints/    plots/
"""

import fcntl
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from hjepa.config import differences, identity
from hjepa.errors import UserError

Record = dict[str, Any]
PREDECESSOR_SECONDS = 120


def refuse_unwritable(path: Path) -> None:
    """Refuse a place where nothing can be written, before any work."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"The folder {path} cannot be written ({there} is in the way); set output_root to a folder that can.")


def lock(file: IO[str]) -> None:
    """Lock a file, at once or not at all; a job that SLURM started again waits for its predecessor, which may still be dying."""
    deadline = time.monotonic() + (PREDECESSOR_SECONDS if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else 0)
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


class RunFolder:
    """A run's folder; nothing is written before `claim`.

    Args:
        path: absolute.
        config: the resolved config.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.lock: IO[str] | None = None
        refuse_unwritable(path)

    def refuse_other_config(self) -> None:
        """Refuse a folder that holds a run of another config, naming what differs."""
        file = self.path / "config.yaml"
        if not file.exists():
            return
        before = OmegaConf.to_container(OmegaConf.load(file))
        changed = differences(identity(before), identity(self.config))  # type: ignore[arg-type]
        if changed:
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(changed)}); "
                "give another name, or overwrite=true to replace it."
            )

    def summary(self) -> Record:
        """The contents of summary.json; empty when there is none."""
        file = self.path / "summary.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def result(self) -> Record:
        """The summary of the run if it is finished and not to be replaced; empty else. Refuses a run of another config."""
        if self.config["overwrite"]:
            return {}
        self.refuse_other_config()
        summary = self.summary()
        return summary if summary.get("status") == "finished" else {}

    def claim(self, overwrite: bool) -> None:
        """Create the folder, lock it against a second process, and write the config; `overwrite` empties it first."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = (self.path / ".lock").open("w")
            lock(self.lock)
        except BlockingIOError:
            raise UserError(f"Another process is working in {self.path}; wait for it, or give this run another name.") from None
        except OSError as error:
            raise UserError(
                f"The run folder {self.path} cannot be written ({error.strerror}); set output_root to a folder that can."
            ) from error
        if overwrite:
            for child in self.path.iterdir():
                if child.name != ".lock":
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
        self.refuse_other_config()
        (self.path / "plots").mkdir(exist_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)  # the end of an earlier sitting
        self.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.config)))

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock:
            self.lock.close()
            self.lock = None

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(self.path / name)

    def write_summary(self, summary: Record) -> None:
        """Write summary.json."""
        self.write("summary.json", json.dumps(summary, indent=2) + "\n")

    def log_handler(self) -> logging.Handler:
        """A handler that appends to run.log."""
        handler = logging.FileHandler(self.path / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        return handler

    def append(self, record: Record) -> None:
        """Add a record with its `step` to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[Record]:
        """All whole records of metrics.jsonl; a line that a crash cut short is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> list[Record]:
        """Drop the records after `step`, which a resumed run will write again; returns the rest."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return kept
