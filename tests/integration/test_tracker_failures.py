"""What a tracker misses while it fails arrives later, once, and a run that fails ends in the tracker as well."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import mlflow
import pytest
from submitit.core.utils import UncompletedJobError

from hjepa.config.errors import UserError
from hjepa.config.schema import resolve
from hjepa.tasks.train import TrainingRun
from hjepa.tracking import mlflow as track_mlflow
from hjepa.tracking.mlflow import MLflow
from hjepa.tracking.resend import send_run
from hjepa.tracking.run_folder import UNSENT_MARKER, read_summary
from tests.helpers.database import prepare_database
from tests.helpers.runs import ROOT, compose


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Return a run folder without records, below an output root with a database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(track_mlflow, "RETRY_SECONDS", 0.0)
    prepare_database(tmp_path)
    folder = tmp_path / "e" / "r"
    folder.mkdir(parents=True)
    return folder


def tracked_run(root: Path) -> mlflow.entities.Run:
    """Return the only run in the database of an output root."""
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


def monitors() -> set[threading.Thread]:
    """Return the threads that record the use of the machine."""
    return {thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"}


def test_a_server_that_cannot_store_files_gets_everything_else_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").touch()  # where the folder of the files would be
    (folder / "config.yaml").write_text("seed: 0\n")
    others = monitors()
    tracker = MLflow(uri=None, output_root=str(tmp_path), system_metrics=True)
    tracker.start(folder, "e", {}, {}, [])
    tracker.log_artifact(folder / "config.yaml")
    for step in range(4):
        record = {"step": step, "loss": 1.0}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        assert tracker.last_task
        tracker.last_task.result()
        tracker.log(record)  # which tries again to send everything
        tracker.last_task.result()
        assert len(monitors() - others) == 1
    assert not tracker.finish("FINISHED"), "the files are missing"
    assert not monitors() - others
    run = tracked_run(tmp_path)
    assert run.info.status == "FINISHED"
    history = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(run.info.run_id, "loss")
    assert sorted(point.step for point in history) == [0, 1, 2, 3]


def test_a_run_whose_opening_failed_gets_its_parameters_later(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise ConnectionError("the server has ended")

    tracker = MLflow(uri=None, output_root=str(tmp_path), system_metrics=False)
    with monkeypatch.context() as failure:
        failure.setattr(MLflow, "send_description", fail)
        run_id = tracker.start(folder, "e", {"seed": 3}, {"commit": "abc"}, [])
    assert tracker.finish("FINISHED")
    run = tracked_run(tmp_path)
    assert run.info.run_id == run_id
    assert (run.info.status, run.data.params, run.data.tags["commit"]) == ("FINISHED", {"seed": "3"}, "abc")


def test_only_the_trackers_of_a_run_mark_it_as_sent(run, tmp_path: Path, caplog) -> None:
    pytest.importorskip("tensorboard")
    prepare_database(tmp_path)
    run("tracking=tensorboard", "name=r")
    folder = tmp_path / "default" / "r"
    (folder / UNSENT_MARKER).touch()
    for trackers, is_left in (("mlflow", True), ("tensorboard", False)):
        config = resolve(compose(f"tracking={trackers}", f"output_root={tmp_path}"))
        assert send_run(config, folder)
        assert (folder / UNSENT_MARKER).exists() is is_left


def test_a_folder_that_cannot_be_sent_does_not_keep_others_from_it(run, tmp_path: Path, caplog) -> None:
    prepare_database(tmp_path)
    good, locked, strange = (tmp_path / "default" / name for name in ("c", "b", "a"))
    for folder in (good, locked):
        shutil.copytree(ROOT / "tests" / "fixtures" / "run_0.1", folder)
    (locked / ".lock").mkdir()  # an OSError, as for the folder of another user
    strange.mkdir()
    (strange / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=rf"^2 of 3 runs could not be sent: {strange}, {locked}; see the warnings above"):
        run("task=sync", f"run={tmp_path}/default", "tracking=mlflow")
    assert f"{strange} was not sent: {strange}/config.yaml cannot be read" in caplog.text
    assert tracked_run(tmp_path).data.tags["run_folder"] == str(good)


def test_a_run_that_may_not_be_requeued_has_failed_in_its_tracker(run, tmp_path: Path, monkeypatch) -> None:
    def refuse(number: int, frame: object) -> None:  # as submitit's handler does
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    def stop(self: TrainingRun, record: dict) -> None:
        write(self, record)
        os.kill(os.getpid(), signal.SIGUSR2)

    write = TrainingRun.record
    prepare_database(tmp_path)
    monkeypatch.setattr(TrainingRun, "record", stop)
    previous = signal.signal(signal.SIGUSR2, refuse)
    try:
        with pytest.raises(UncompletedJobError):
            run("tracking=mlflow", "name=r")
    finally:
        signal.signal(signal.SIGUSR2, previous)
    summary = read_summary(tmp_path / "default" / "r")
    assert (summary["status"], "timed-out too many times" in summary["reason"]) == ("failed", True)
    assert tracked_run(tmp_path).info.status == "FAILED"
    assert not (tmp_path / "default" / "r" / UNSENT_MARKER).exists()
