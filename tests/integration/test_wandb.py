"""W&B, offline: its files beside a run that goes on, of a copied run folder, and without passwords."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from hjepa.config.errors import UserError
from hjepa.tracking.run_folder import try_lock
from hjepa.tracking.tracker import Artifacts
from hjepa.tracking.wandb import Wandb
from tests.helpers.runs import ROOT

pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]' to test it")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run that has failed."""
    folder = Path(shutil.copytree(ROOT / "tests" / "fixtures" / "run_0.1", tmp_path / "r"))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "failed"}))
    return folder


def track(folder: Path) -> Path:
    """Write a session of a run for W&B, and return the file that holds it."""
    tracker = Wandb("offline", "project", system_metrics=False)
    tracker.start(folder, "e", {"seed": 0}, {}, [{"step": 0, "loss": 1.0}])
    assert tracker.finish("FINISHED")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


def test_a_run_that_goes_on_keeps_its_file(folder: Path) -> None:
    file = track(folder)
    additions = Artifacts([], "evaluate", metrics={"linear": 0.5}, run=folder)
    with try_lock(folder), pytest.raises(UserError, match="the run is still going on"):
        Wandb("offline", "project", system_metrics=False).add_artifacts("", additions)
    assert file.exists()


def test_what_a_task_adds_does_not_change_how_a_run_has_ended(folder: Path, monkeypatch) -> None:
    statuses, finish = [], Wandb.finish
    monkeypatch.setattr(Wandb, "finish", lambda self, status: statuses.append(status) or finish(self, status))
    additions = Artifacts([], "evaluate", metrics={"linear": 0.5}, run=folder)
    Wandb("offline", "project", system_metrics=False).add_artifacts("", additions)
    assert statuses == ["FAILED"]
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_a_copied_run_folder_becomes_a_run_of_its_own_and_a_moved_one_does_not(folder: Path, tmp_path: Path) -> None:
    first = track(folder).name
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    second = track(copy).name
    assert second != first
    assert track(copy).name == second
    assert track(folder).name == first
    assert track(folder.rename(tmp_path / "moved")).name == first


def test_the_password_of_another_tracker_is_not_recorded(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", "tracking.mlflow.uri=http://user:secret@host"])
    track(folder)
    files = [file for file in (folder / "wandb").rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if b"secret" in file.read_bytes()]
