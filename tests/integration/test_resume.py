"""A run that is stopped and started again goes on where it was, and its files are never damaged; see also test_kills."""

import errno
import json
import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.distributed.process_group import World
from hjepa.models.pretrained import read_checkpoint
from hjepa.tracking.run_folder import RunFolder
from hjepa.training.checkpoint import Checkpointer, best_rank
from hjepa.training.signals import StopFlag
from tests.helpers.children import start
from tests.helpers.results import wait_for_records
from tests.helpers.runs import TINY


def test_sigterm_saves_ends_as_stopped_and_continues(tmp_path: Path) -> None:
    command = [*TINY, "train.epochs=40", f"output_root={tmp_path}", "experiment_name=e", "name=r"]
    folder = tmp_path / "e" / "r"
    process = start(*command, output=tmp_path / "output", errors=tmp_path / "errors")
    wait_for_records(folder, 4, process.is_alive)
    process.terminate()
    process.join(60)
    assert process.exitcode == 130
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "stopped"
    state = torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)
    assert state["step"] == summary["steps"] < 40 * 9


def test_a_finished_run_started_again_does_nothing_and_says_so(run, tmp_path: Path, capsys) -> None:
    first = run("name=r")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "default" / "r").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert run("name=r") == first
    assert "overwrite=true" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "default" / "r").rglob("*") if p.is_file()}


def test_the_folder_of_another_config_is_refused_and_overwrite_replaces_it(run, tmp_path: Path) -> None:
    run("name=r")
    with pytest.raises(UserError, match=r"optimizer.lr: 0.002 -> 0.003"):
        run("name=r", "optimizer.lr=0.003")
    run("name=r", "optimizer.lr=0.003", "overwrite=true")
    assert "lr: 0.003" in (tmp_path / "default" / "r" / "config.yaml").read_text()


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_job_that_is_started_again_does_not_empty_its_folder_again(tmp_path: Path, monkeypatch, executor: str) -> None:
    jobs = {"SLURM_JOB_ID": "7", "SUBMITIT_LOCAL_JOB_ID": "7", "SUBMITIT_FOLDER": str(tmp_path)}
    for name, value in {"SUBMITIT_EXECUTOR": executor, **jobs}.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path / "r", {})
    assert not folder.was_emptied_by_this_job()
    folder.claim(overwrite=True)
    folder.release()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert folder.was_emptied_by_this_job()
    monkeypatch.setenv("SLURM_JOB_ID" if executor == "slurm" else "SUBMITIT_LOCAL_JOB_ID", "8")
    assert not folder.was_emptied_by_this_job()


def test_checkpoints_are_kept_on_file_systems_without_hard_links(tmp_path: Path, monkeypatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "latest.pt").write_bytes(b"state")
    checkpointer(tmp_path).keep_as("epoch-00001.pt", tmp_path / "latest.pt")
    assert (tmp_path / "epoch-00001.pt").read_bytes() == b"state"


def test_a_run_whose_folder_is_removed_ends_with_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    process = start(
        *TINY, "train.epochs=40", f"output_root={tmp_path}", "name=r", output=tmp_path / "output", errors=tmp_path / "errors"
    )
    folder = tmp_path / "default" / "r"
    wait_for_records(folder, 4, process.is_alive)
    folder.rename(tmp_path / "elsewhere")
    process.join(60)
    assert process.exitcode == 1
    message = f"The run folder {folder} was removed; the same command starts the run again.\n"
    assert (tmp_path / "errors").read_text().endswith(message)
    assert not folder.exists()


def test_a_damaged_checkpoint_is_refused(run, tmp_path: Path) -> None:
    run("name=r")
    folder = tmp_path / "default" / "r"
    (folder / "summary.json").unlink()
    latest = folder / "checkpoints" / "latest.pt"
    latest.write_bytes(latest.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        run("name=r")


def test_foreign_and_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="lacks identity, model, optimizer, step"):
        read_checkpoint(tmp_path / "foreign.pt", torch.device("cpu"))
    with pytest.raises(UserError, match="no checkpoint"):
        read_checkpoint(tmp_path / "nothing.pt", torch.device("cpu"))


def test_pickled_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"step": 0, "model": Evil(), "optimizer": {}, "identity": {}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "evil.pt", torch.device("cpu"))
    assert not (tmp_path / "owned").exists()


class State(dict):
    """A state that is saved and loaded as it is."""

    def state_dict(self) -> dict[str, object]:
        return dict(self)

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.update(state)


def checkpointer(folder: Path, world: World | None = None, **options: object) -> Checkpointer:
    """Return a checkpointer with a prepared folder."""
    result = Checkpointer(**({"every_seconds": 60, "every_epochs": None, "last": 0, "best": 0} | options))
    result.attach(folder, {"seed": 0}, world or World())
    result.clean()
    return result


def complete(step: int) -> State:
    """Return the state of a trainer with the keys that every checkpoint has."""
    return State(step=step, model={}, optimizer={})


def test_saving_and_loading_are_inverse(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path)
    saved.save(complete(7), State(seconds=2.5))
    trainer, monitor = State(), State()
    assert checkpointer(tmp_path).load(trainer, monitor, torch.device("cpu"))
    assert (trainer["step"], monitor) == (7, {"seconds": 2.5})


def test_the_main_process_decides_whether_there_is_a_checkpoint(tmp_path: Path) -> None:
    class StaleWorld(World):
        def broadcast_object(self, value: object) -> object:
            return False

    checkpointer(tmp_path).save(complete(7), State())
    assert checkpointer(tmp_path, StaleWorld()).load(State(), State(), torch.device("cpu")) is None


def test_what_submitit_writes_at_a_requeue_is_private(tmp_path: Path) -> None:
    stop = StopFlag()
    stop.previous_handlers[signal.SIGUSR2] = lambda number, frame: (tmp_path / "config.pkl").touch()
    stop.adopt(requeue=True)
    before = os.umask(0o022)
    try:
        stop.leave()
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "config.pkl").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o644


def test_a_run_in_another_thread_handles_no_signals() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(StopFlag().__enter__).result()


def test_a_failed_write_leaves_the_old_checkpoint_and_no_temporary_file(tmp_path: Path, monkeypatch) -> None:
    saved = checkpointer(tmp_path)
    saved.save(complete(1), State())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved.save(complete(2), State())
    assert torch.load(saved.latest, weights_only=True)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path, every_epochs=3, last=2, best=2)
    for epoch, score in enumerate([0.2, 0.5, 0.3, 0.5, 0.4, 0.1, 0.45], start=1):
        saved.save(complete(epoch), State(), epoch, score)
    assert {p.name for p in tmp_path.glob("epoch-*")} == {f"epoch-{n:05d}.pt" for n in (3, 6, 7)}
    assert sorted(best_rank(p) for p in tmp_path.glob("best-*")) == [(0.5, -4), (0.5, -2)]
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 2, "the earlier of two equal scores"
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["step"] == 7
    assert not list(tmp_path.glob(".*.tmp"))


def test_processes_that_write_nothing_count_the_seconds_since_a_save_as_well(tmp_path: Path) -> None:
    """Otherwise they would ask for a save in every step, once the interval has passed for the first time."""
    worker = checkpointer(tmp_path, World(rank=1, size=2), every_seconds=0.05)
    time.sleep(0.1)
    assert worker.due()
    worker.save(complete(1), State())
    assert not worker.due()
    assert not worker.latest.exists()


def test_two_processes_cannot_share_a_folder(tmp_path: Path, run) -> None:
    import fcntl

    folder = tmp_path / "default" / "r"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another process"):
            run("name=r")
