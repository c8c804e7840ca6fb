"""The run folder: what a run leaves behind, and the guard that one folder holds one run.

config.yaml   the resolved config        metrics.jsonl   every metric by step, the truth that trackers copy
summary.json  the machine-readable end   run.log         what was said
run_id        the tracker's run          checkpoints/    plots/
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.identity import differences, identity
from hjepa.config.upgrade import upgrade_config, upgrade_summary
from hjepa.tracking.atomic import atomic_write

Record = dict[str, Any]

PREDECESSOR_SECONDS = 120.0  # a job that SLURM started again waits so long for its predecessor, which may still be dying

UNSENT_MARKER = ".unsent"  # is there while trackers may lack something of a run

LOCK_SECONDS = 2.0  # a look at whether a folder is in use takes its lock, but never so long


def read_records(folder: Path) -> list[Record]:
    """All whole records of a run folder; a line that a crash cut short is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_summary(folder: Path) -> Record:
    """The contents of summary.json; empty when there is none."""
    file = folder / "summary.json"
    return upgrade_summary(json.loads(file.read_text())) if file.exists() else {}


def runs_below(folder: Path) -> list[Path]:
    """The folder, if it is a run's, and all run folders in it, in order; runs that have recorded nothing are none."""
    return sorted(file.parent for file in folder.rglob("metrics.jsonl"))


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run folder as plain data; nothing in it is resolved or instantiated."""
    file = folder / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise UserError(f"{file} cannot be read as a config ({type(error).__name__}); give the folder of a run.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no config; give the folder of a run.")
    return upgrade_config(config)


@contextlib.contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Whether nobody works in a run folder; until the context ends, nobody can begin to."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class LogFile(logging.FileHandler):
    """run.log; on a full disk it stays behind in silence, for the run itself then stops with the reason."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""

    def close(self) -> None:
        """Close, whether or not what is left can be written."""
        with contextlib.suppress(OSError):
            super().close()


def check_writable(path: Path, mend: str = "set output_root to a folder that can") -> None:
    """Refuse a place where nothing can be written, before any work; `mend` says what to do."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"The folder {path} cannot be written ({there} is in the way); {mend}.")


class RunFolder:
    """A run's folder; nothing is written before `claim`.

    Args:
        path: absolute.
        config: the resolved config.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.lock: IO[str] | None = None
        check_writable(path)

    def check_same_config(self) -> None:
        """Refuse a folder that holds a run of another config, naming what differs."""
        if not (self.path / "config.yaml").exists():
            return
        changed = differences(identity(read_config(self.path)), identity(self.config))
        if changed:
            raise UserError(
                f"{self.path} holds a run with another config ({'; '.join(changed)}); "
                "give another name, or overwrite=true to replace it."
            )

    def summary(self) -> Record:
        """The contents of summary.json; empty when there is none."""
        return read_summary(self.path)

    def result(self) -> Record:
        """The summary of the run if it is finished and not to be replaced; empty else. Refuses a run of another config."""
        if self.config["overwrite"]:
            return {}
        self.check_same_config()
        summary = self.summary()
        return summary if summary.get("status") == "finished" else {}

    def claim(self, overwrite: bool) -> None:
        """Create the folder, lock it against a second process, and write the config; `overwrite` empties it first."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.take_lock()
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
        self.check_same_config()
        (self.path / "plots").mkdir(exist_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)  # the end of an earlier sitting
        self.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.config)))

    def take_lock(self) -> None:
        """Lock the folder; raises BlockingIOError when another process keeps it."""
        self.lock = (self.path / ".lock").open("w")
        os.register_at_fork(after_in_child=self.release)  # else a worker would keep it after this process is killed
        requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        deadline = time.monotonic() + (PREDECESSOR_SECONDS if requeued else LOCK_SECONDS)
        while True:
            try:
                return fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock:
            self.lock.close()
            self.lock = None

    def mark_unsent(self) -> None:
        """Note that trackers may lack something from now on."""
        self.write(UNSENT_MARKER, "")

    def mark_sent(self) -> None:
        """Note that trackers have everything."""
        (self.path / UNSENT_MARKER).unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        atomic_write(self.path / name, text)

    def write_summary(self, summary: Record) -> None:
        """Write summary.json."""
        self.write("summary.json", json.dumps(summary, indent=2) + "\n")

    def log_handler(self) -> logging.Handler:
        """A handler that appends to run.log."""
        handler = LogFile(self.path / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        return handler

    def append(self, record: Record) -> None:
        """Add a record with its `step` to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> list[Record]:
        """Drop the records after `step`, which a resumed run will write again; returns the rest."""
        kept = [record for record in read_records(self.path) if record["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return kept
