"""The run folder: everything that a run writes, and the lock that keeps a second process out of it.

config.yaml     the resolved config
metrics.jsonl   every metric by step; trackers hold copies of it
summary.json    how the run ended and its results, for programs
run.log         everything that was logged
run_id          id of the run in its tracker
checkpoints/    plots/
"""

import contextlib
import errno
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
from hjepa.config.extension import check_same_run
from hjepa.config.identity import starts_from_weights
from hjepa.config.passwords import PasswordFilter, hide_passwords
from hjepa.config.saved import read_config as read_config  # belongs to what this module reads
from hjepa.config.upgrade import upgrade_summary
from hjepa.tracking.atomic import atomic_write

Record = dict[str, Any]

UNSENT_MARKER = ".unsent"  # this file exists while trackers may lack something of the run

EMPTIED_MARKER = ".emptied_by"  # names the job that has emptied the folder last

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # errors of file systems without file locks

LOCK_SECONDS = 2.0  # how long to wait for the lock, which `try_lock` of another process takes for a moment

PREDECESSOR_SECONDS = 120.0  # the same for a job that SLURM has restarted, whose predecessor may still be ending


def read_records(folder: Path) -> list[Record]:
    """Return all records of a run folder, without a last line that a crash has cut off."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_summary(folder: Path) -> Record:
    """Return the contents of summary.json; empty if it does not exist."""
    file = folder / "summary.json"
    if not file.exists():
        return {}
    summary = json.loads(file.read_text())
    is_old = "untrained" in summary and "initial" not in summary and (folder / "config.yaml").exists()
    return upgrade_summary(summary, is_old and measures_given_weights(read_config(folder)))


def measures_given_weights(config: dict[str, Any]) -> bool:
    """Return whether the probes of a run of version 0.1, which measured the teacher, began with weights that it was given."""
    return starts_from_weights(config) or bool(config.get("teacher", {}).get("weights"))


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run in MLflow that was made for a run folder first; None if there is none."""
    file = folder / "run_id"
    return file.read_text() if file.exists() else None


def is_copy(folder: Path, original: Path, name: str) -> bool:
    """Return whether a run folder is a copy of another one that still exists.

    Args:
        folder: Run folder.
        original: Folder that the run had when its tracker last wrote to it.
        name: Name of the file in the folder with the id of the tracked run, which a copy shares with its original.
    """
    try:
        return not original.samefile(folder) and (original / name).read_text() == (folder / name).read_text()
    except OSError:  # it was moved, or belongs to another user
        return False


def find_runs(folder: Path) -> list[Path]:
    """Return all run folders with records in this folder, including itself, in order."""
    return sorted(file.parent for file in folder.rglob("metrics.jsonl"))


def job_name() -> str:
    """Return a name of the job that this process belongs to, which stays the same when the job is started again."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return f"{os.environ['SUBMITIT_FOLDER']}/{os.environ['SUBMITIT_LOCAL_JOB_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")


def was_requeued() -> bool:
    """Return whether SLURM has started the job of this process again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


@contextlib.contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Try to lock a run folder until the context ends; yield False if another process has locked it."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def remove(path: Path) -> None:
    """Remove a file or a folder with its contents."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class LogFile(logging.FileHandler):
    """Handler of run.log that ignores a full disk, because the run itself then stops with that message."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def check_writable(path: Path, remedy: str = "set output_root to a writable folder") -> None:
    """Raise a UserError with a remedy if files cannot be written to a folder, which need not exist yet."""
    existing = path
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        obstacle = "no folder" if not existing.is_dir() else "" if os.access(existing, os.W_OK) else "read-only"
    except OSError:  # a folder without permission
        obstacle = "not accessible"
    if obstacle:
        raise UserError(f"The folder {path} cannot be written ({existing} is {obstacle}); {remedy}.")


class RunFolder:
    """The folder of a run; nothing is written to it before `claim`.

    Args:
        path: Absolute path.
        config: The resolved config of the run.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config
        self.lock: IO[str] | None = None
        check_writable(path)

    def check_same_config(self) -> bool:
        """Raise a UserError if the folder holds another run; return whether the config makes the run that it holds longer."""
        return (self.path / "config.yaml").exists() and check_same_run(self.path, self.config)

    def summary(self) -> Record:
        """Return the contents of summary.json; empty if it does not exist."""
        return read_summary(self.path)

    def finished_summary(self) -> Record:
        """Return the summary of a finished run of the same config; empty if there is something left to train."""
        if self.config["overwrite"]:
            return {}
        is_longer, summary = self.check_same_config(), self.summary()
        return summary if summary.get("status") == "finished" and not is_longer else {}

    def claim(self, overwrite: bool) -> None:
        """Create the folder, lock it against other processes, and write the config; `overwrite` empties it first."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.acquire_lock()
        except BlockingIOError:
            raise UserError(
                f"Another process is working in {self.path}; wait for it, or choose another name for this run."
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise UserError(
                    f"The file system of {self.path} does not support file locks ({error.strerror}); set output_root to one that "
                    "does, such as a local disk."
                ) from error
            raise UserError(
                f"The run folder {self.path} cannot be written ({error.strerror}); set output_root to a writable folder."
            ) from error
        if overwrite:
            self.empty()
        self.check_same_config()
        (self.path / "plots").mkdir(exist_ok=True)
        (self.path / "summary.json").unlink(missing_ok=True)  # of an earlier session
        # Training this config again changes nothing, and it does not name itself as a run to extend.
        config = self.config | {"overwrite": False, "extend": False, "run": None}
        self.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(hide_passwords(config))))

    def empty(self) -> None:
        """Remove everything in the folder, and record which job has done so."""
        for child in self.path.iterdir():
            if child.name != ".lock":
                remove(child)
        if job := job_name():
            self.write(EMPTIED_MARKER, job)

    def was_emptied_by_this_job(self) -> bool:
        """Return whether the job of this process emptied the folder before SLURM or a time limit interrupted it."""
        marker = self.path / EMPTIED_MARKER
        may_be_restarted = was_requeued() or os.environ.get("SUBMITIT_EXECUTOR") == "local"
        return may_be_restarted and marker.exists() and marker.read_text() == job_name()

    def acquire_lock(self) -> None:
        """Lock the folder, or raise BlockingIOError if another process keeps it locked."""
        self.lock = (self.path / ".lock").open("w")
        os.register_at_fork(after_in_child=self.release)  # otherwise a worker would keep it after this process is killed
        deadline = time.monotonic() + (PREDECESSOR_SECONDS if was_requeued() else LOCK_SECONDS)
        while True:
            try:
                return fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def was_removed(self) -> bool:
        """Return whether somebody removed the folder after `claim`."""
        return not (self.path / "config.yaml").exists()

    def release(self) -> None:
        """Unlock the folder."""
        if self.lock:
            self.lock.close()
            self.lock = None

    def mark_unsent(self) -> None:
        """Record that trackers may lack something from now on."""
        self.write(UNSENT_MARKER, "")

    def mark_sent(self) -> None:
        """Record that trackers have everything."""
        (self.path / UNSENT_MARKER).unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        atomic_write(self.path / name, text)

    def write_summary(self, summary: Record) -> None:
        """Write summary.json."""
        self.write("summary.json", json.dumps(summary, indent=2) + "\n")

    def log_handler(self) -> logging.Handler:
        """Return a logging handler that appends to run.log."""
        handler = LogFile(self.path / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handler.addFilter(PasswordFilter())
        return handler

    def append(self, record: Record) -> None:
        """Append a record, which has a `step`, to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> list[Record]:
        """Remove the records after a step, which a resumed run will write again, and return the remaining ones."""
        kept = [record for record in read_records(self.path) if record["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return kept
