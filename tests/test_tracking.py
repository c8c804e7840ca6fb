"""MLflow on a real database: resumed without repeats, and never in the way of training."""

import json
import logging
from pathlib import Path

import mlflow
import pytest

from hjepa.tracking import MLflow


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def start(run_id: str | None = None) -> MLflow:
        t = MLflow(uri=None, output_root=str(tmp_path), system_metrics=False)
        t.start(tmp_path / "run", "e", run_id, {f"p{i}": i for i in range(250)}, {"commit": "abc"})
        return t

    return start


def history(tmp_path: Path, run_id: str, key: str) -> list[int]:
    return [m.step for m in mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(run_id, key)]


def test_everything_arrives_once(tracker, tmp_path: Path) -> None:
    t = tracker()
    for step in range(1200):
        t.log({"step": step, "loss": 1.0 / (step + 1)})
    t.finish("FINISHED")
    run = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(t.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 250
    assert run.data.tags["commit"] == "abc"
    assert run.data.tags["run_folder"] == str(tmp_path / "run")
    assert history(tmp_path, t.run_id, "loss") == list(range(1200))


@pytest.mark.parametrize("remembered", [True, False])
def test_resume_sends_only_what_is_missing(tracker, tmp_path: Path, remembered: bool) -> None:
    first = tracker()
    for step in range(10):
        first.log({"step": step, "loss": 0.0})
    first.flush()
    first.thread.shutdown()  # and then the process dies: the run still counts as running
    second = tracker(first.run_id if remembered else None)
    assert second.run_id == first.run_id, "found by its folder when the id was never written down"
    for step in range(5, 15):
        second.log({"step": step, "loss": 0.0, "late": 1.0})
    second.finish("FINISHED")
    assert history(tmp_path, first.run_id, "loss") == list(range(15))
    assert history(tmp_path, first.run_id, "late") == list(range(5, 15))


def test_a_dead_server_is_said_once_and_stops_nothing(run, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, logger="hjepa"):
        run("tracking=mlflow", "tracking.uri=http://127.0.0.1:9", "name=r")
    assert len([r for r in caplog.records if "the run goes on" in r.message]) == 1
    folder = tmp_path / "default" / "r"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) > 5


def test_two_trackers_starting_at_once_on_a_fresh_database(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "from pathlib import Path; from hjepa.tracking import MLflow; import sys\n"
        f"t = MLflow(uri=None, output_root={str(tmp_path)!r}, system_metrics=False)\n"
        f"t.start(Path({str(tmp_path)!r}) / sys.argv[1], 'e', None, {{}}, {{}})\n"
        "t.log({'step': 1, 'x': 1.0}); t.finish('FINISHED')\n"
        "assert not t.broken"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, f"run{i}"]) for i in range(3)]
    assert [p.wait(300) for p in processes] == [0, 0, 0]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert sorted(r.info.run_name for r in runs) == ["run0", "run1", "run2"]
