"""Files and folders are written completely or not at all."""

import os
import subprocess
from pathlib import Path

import pytest

from hjepa.tracking.atomic import atomic_files, atomic_folder, atomic_write


@pytest.mark.parametrize("sync", [False, True])
def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path, sync: bool) -> None:
    for text in ("old", "new"):
        atomic_write(tmp_path / "file", text, sync=sync)
        assert (tmp_path / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_all_old_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    paths[0].write_text("old")

    def write_and_fail() -> None:
        with atomic_files(*paths) as temporary_paths:
            for path in temporary_paths:
                path.write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        write_and_fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_files_of_other_writers_are_kept_and_those_of_killed_ones_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen("true")
    ended.wait()
    files = {pid: tmp_path / f".file.{pid}.tmp" for pid in (os.getppid(), ended.pid)}
    for file in files.values():
        file.touch()
    atomic_write(tmp_path / "file", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"file", files[os.getppid()].name}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("old", "new"):
        with atomic_folder(folder) as temporary:
            (temporary / name).touch()
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]
