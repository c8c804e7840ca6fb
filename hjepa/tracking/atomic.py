"""Files and folders that are written completely or not at all.

New content is written under a temporary name in the same folder and then renamed, so that readers and crashes see either the
old content or the new one. A write that fails leaves nothing behind: a full disk has room again to record the reason.
"""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def atomic_files(*paths: Path, sync: bool = False) -> Iterator[list[Path]]:
    """Yield one temporary path per target path; rename them when the context succeeds and remove them when it fails.

    Args:
        *paths: Target paths.
        sync: Flush the files to the disk before they are renamed, so that they also survive a power failure.
    """
    temporary_paths = [temporary_path(path) for path in paths]
    for path in paths:
        remove_leftovers(path)
    try:
        yield temporary_paths
        for temporary, path in zip(temporary_paths, paths, strict=True):
            if sync:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        for temporary in temporary_paths:
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return a temporary name for a file, which belongs to this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote a file."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            leftover.unlink(missing_ok=True)


def atomic_write(path: Path, text: str, sync: bool = False) -> None:
    """Write a text file atomically; see `atomic_files`."""
    with atomic_files(path, sync=sync) as (temporary,):
        temporary.write_text(text)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder that replaces `path` when the context succeeds and is removed when it fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
