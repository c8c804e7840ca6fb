"""`extend=true`: a run that ended or was stopped goes on to a larger length, in place."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.config.run import perform
from hjepa.config.run_path import run_path
from hjepa.tracking.run_folder import RunFolder, read_config, read_records, read_summary
from tests.helpers.runs import checked_config

SHORT = ("dataset.train=120", "probe.train_images=60", "probe.penalties=[0.01]")  # four steps an epoch

EXACT = (*SHORT, "schedule=constant", "teacher.half_life=20", "train.log_every=2")  # schedules that do not depend on the length

TIMES = ("images_per_second", "seconds", "peak_memory_mb")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["model"]


def check_equal(a: Path, b: Path, extra: int | None = None) -> None:
    """Check that two runs have the same weights, and the same records apart from those of the earlier end of the second one."""
    assert all(torch.equal(value, weights(b)[key]) for key, value in weights(a).items())
    first, second = ([{k: v for k, v in r.items() if k not in TIMES} for r in read_records(folder)] for folder in (a, b))
    assert first == [record for record in second if not (record["step"] == extra and "epoch" in record)]


@pytest.fixture
def stop_at(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """Stop the run in a folder as Ctrl-C or a scheduler does, once it has written this many records."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait_and_stop(folder: Path, count: int) -> None:
        while len(read_records(folder)) < count:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    yield lambda folder, count: threading.Thread(target=wait_and_stop, args=(folder, count), daemon=True).start()
    signal.signal(signal.SIGTERM, previous)


def test_a_finished_run_goes_on_as_the_run_of_the_full_length(run, tmp_path: Path, caplog) -> None:
    """The earlier end lies within an epoch, whose means still cover the whole epoch."""
    options = (*EXACT, "train.epochs=null")
    run(*options, "train.steps=6", "name=r")
    with caplog.at_level("INFO"):
        run(*options, "train.steps=8", "name=r", "extend=true")
    assert "from 6 to 8 steps: its schedules of the 6 steps so far are the same" in caplog.text
    run(*options, "train.steps=8", "name=full")
    check_equal(tmp_path / "default" / "full", tmp_path / "default" / "r", extra=6)
    assert read_summary(tmp_path / "default" / "r")["steps"] == 8
    assert read_config(tmp_path / "default" / "r")["train"]["steps"] == 8


@pytest.mark.thorough
def test_a_run_with_wsd_that_was_stopped_before_its_decay_goes_on_exactly(run, tmp_path: Path, stop_at) -> None:
    options = (*SHORT, "schedule=wsd", "schedule.lr.decay=0.5", "schedule.lr.end=0", "teacher.half_life=20", "train.log_every=1")
    stop_at(tmp_path / "default" / "r", 5)
    with pytest.raises(SystemExit):
        run(*options, "train.epochs=4", "name=r")
    assert read_summary(tmp_path / "default" / "r")["status"] == "stopped"
    assert read_summary(tmp_path / "default" / "r")["steps"] <= 10, "the decay has not begun"
    run(*options, "train.epochs=5", "name=r", "extend=true")
    run(*options, "train.epochs=5", "name=full")
    check_equal(tmp_path / "default" / "full", tmp_path / "default" / "r")


def test_the_default_name_finds_the_shorter_run_which_the_same_command_then_shows(run, tmp_path: Path, capsys, caplog) -> None:
    run(*SHORT, "train.epochs=1")
    (folder,) = (tmp_path / "default").iterdir()
    with caplog.at_level("INFO"):
        run(*SHORT, "train.epochs=2", "extend=true")
    assert "from step 4 on, its schedules are those of the new length (learning rate" in caplog.text, "a linear schedule"
    assert [path.name for path in (tmp_path / "default").iterdir()] == [folder.name]
    assert read_summary(folder)["epochs"] == 2
    assert [r["epoch"] for r in read_records(folder) if "epoch" in r] == [1, 2]
    capsys.readouterr()
    run(*SHORT, "train.epochs=2", "extend=true")
    assert "This run is finished" in capsys.readouterr().out


def claim(root: Path, *overrides: str) -> Path:
    """Make the folder of a run that has only just begun, which holds its config."""
    config = checked_config(f"output_root={root}", "name=null", *overrides)
    folder = RunFolder(run_path(config), config)
    folder.claim(overwrite=False)
    folder.release()
    return folder.path


def test_a_run_is_extended_by_its_folder(tmp_path: Path) -> None:
    folder = claim(tmp_path, "train.epochs=1", "name=r")
    longer = checked_config("train.epochs=2", "extend=true", f"run={folder}", f"output_root={tmp_path}/elsewhere")
    assert run_path(longer) == folder
    extended = RunFolder(folder, longer)
    assert extended.check_same_config(), "it makes the run longer"
    extended.claim(overwrite=False)
    extended.release()
    assert read_config(folder)["run"] is None, "the config of the run can be trained again as it is"


REFUSED = {
    ("name=r", "train.epochs=3"): "extend=true trains this run on to the new length and keeps everything; another name keeps",
    ("name=r", "optimizer.lr=0.1", "extend=true"): "Ways out: another name keeps this run .* init_from=.*/r keeps this run",
    ("name=r", "train.epochs=3", "optimizer.lr=0.1", "extend=true"): "Ways out: another name",
    ("name=r", "train.epochs=null", "train.steps=90", "extend=true"): "set train.epochs to more than 2, and no other length",
    ("name=r", "train.epochs=1", "extend=true"): "set train.epochs to more than 2",
    ("name=s", "train.epochs=3", "extend=true"): "/s holds no run that differs from this one in its length only",
    ("seed=7", "train.epochs=3", "extend=true"): "/default holds no run that differs",
    ("run=/nowhere/r", "train.epochs=3", "extend=true"): "/nowhere/r holds no run",
    ("name=r", "train.epochs=3", "extend=true", "overwrite=true"): "leave one of them out",
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.items(), ids=[" ".join(overrides) for overrides in REFUSED])
def test_what_is_no_longer_run_is_refused_and_changes_nothing(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    claim(tmp_path, "name=r")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config = checked_config(f"output_root={tmp_path}", *overrides)
    with pytest.raises(UserError, match=message) as caught:
        perform(config, run_path(config))
    assert "\n" not in str(caught.value)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_several_shorter_runs_are_named(tmp_path: Path) -> None:
    folders = [claim(tmp_path, f"train.epochs={epochs}") for epochs in (1, 2)]
    longer = checked_config(f"output_root={tmp_path}", "train.epochs=3", "extend=true")
    with pytest.raises(UserError, match=r"several runs .* choose one by name=") as caught:
        run_path(longer)
    assert all(folder.name in str(caught.value) for folder in folders)
    shorter = checked_config(f"output_root={tmp_path}", "train.epochs=2", "extend=true")
    assert run_path(shorter) == folders[1], "the run of this very config"
