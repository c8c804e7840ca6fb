"""MLflow after its users have tidied up: deleted experiments, deleted runs, replaced databases, and addresses with passwords."""

import shlex
import shutil
import sys
from pathlib import Path

import mlflow
import pytest

from hjepa.config.errors import UserError
from hjepa.config.schema import resolve
from hjepa.tracking.mlflow import MLflow
from hjepa.tracking.mlflow_server import tracking_uri, view_command
from hjepa.tracking.tracker import Artifacts, log_artifacts
from tests.helpers.database import prepare_database
from tests.helpers.runs import ROOT, compose


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Return a finished run that was sent to a database; evaluations find it through MLFLOW_TRACKING_URI."""
    prepare_database(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Path(shutil.copytree(ROOT / "tests" / "fixtures" / "run_0.1", tmp_path / "default" / "r"))


def copies(uri: str, folder: Path) -> list[mlflow.entities.Run]:
    """Return the runs of a folder that were not deleted."""
    client = mlflow.MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.run_folder = '{folder}'")


def evaluate(folder: Path) -> None:
    """Add a file and a metric to the tracked run, as task=evaluate does."""
    file = folder / "table.txt"
    file.write_text("accuracy")
    config = resolve(compose("tracking=mlflow", f"run={folder}"))
    log_artifacts(config, folder, Artifacts([file], "evaluate", metrics={"evaluate/knn": 0.5}, step=18))


def check_evaluated(uri: str, folder: Path) -> str:
    """Check that the folder has one run, and that it has the evaluation; return its id."""
    (run,) = copies(uri, folder)
    assert run.data.metrics["evaluate/knn"] == 0.5
    assert [file.path for file in mlflow.MlflowClient(uri).list_artifacts(run.info.run_id, "evaluate")] == ["evaluate/table.txt"]
    return str(run.info.run_id)


def test_evaluation_and_sync_find_the_copy_of_a_run(run, folder: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    sync = ("task=sync", f"run={folder}", "tracking=mlflow")
    first_uri, second_uri = (f"sqlite:///{tmp_path}/{name}.db" for name in ("mlflow", "second"))
    run(*sync)
    evaluate(folder)
    original = check_evaluated(first_uri, folder)
    assert (folder / "run_id").read_text() == original
    client = mlflow.MlflowClient(first_uri)
    client.delete_run(original)
    evaluate(folder)
    assert "does not have this run; task=sync run=FOLDER sends it" in caplog.text
    for _ in range(2):  # the second time finds the copy
        run(*sync)
    evaluate(folder)
    assert check_evaluated(first_uri, folder) != original
    prepare_database(tmp_path / "new")
    (tmp_path / "new" / "mlflow.db").rename(tmp_path / "second.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", second_uri)  # as if another database had taken its place
    run(*sync)
    evaluate(folder)
    assert check_evaluated(second_uri, folder) != original


def test_a_deleted_experiment_is_restored_or_replaced_by_another(run, folder: Path, tmp_path: Path, caplog) -> None:
    sync, uri = ("task=sync", f"run={folder}", "tracking=mlflow"), f"sqlite:///{tmp_path}/mlflow.db"
    run(*sync)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("default").experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(UserError, match="1 of 1 runs could not be sent"):
        run(*sync)
    assert f"restore it (mlflow experiments restore --experiment-id {experiment}), or choose another name" in caplog.text
    run(*sync, "task.experiment=another")
    evaluate(folder)
    check_evaluated(uri, folder)
    (copy,) = copies(uri, folder)
    assert client.get_experiment(copy.info.experiment_id).name == "another"
    tracker = MLflow(uri, str(tmp_path), system_metrics=False)
    tracker.start(folder, "default", {}, {}, [])
    assert tracker.view_command() is None, "there is nothing to view"
    assert not tracker.finish("FINISHED")


def test_a_password_appears_nowhere(run, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    uri = "http://user:secret@127.0.0.1:9"
    trackers = ("tracking=[mlflow,tensorboard]", f"tracking.mlflow.uri={uri}")
    run(*trackers, "name=r", "train.epochs=null", "train.steps=2")
    folder = tmp_path / "default" / "r"
    with pytest.raises(UserError, match="could not be sent"):
        run("task=sync", f"run={folder}", *trackers)
    run("task=report", f"run={folder}", *trackers)
    output = capfd.readouterr()
    assert "http://user:***@127.0.0.1:9" in output.out + output.err + (folder / "run.log").read_text()
    assert "secret" not in output.out + output.err
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"config.yaml", "summary.json", "run.log", "report.html"} <= {file.name for file in files}
    assert not [file for file in files if b"secret" in file.read_bytes()]


def test_a_password_that_a_run_does_not_store_comes_from_the_environment(monkeypatch) -> None:
    whole, stored = "postgresql://u:secret@host/db", "postgresql://u:***@host/db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(whole, Path("/o")) == whole
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to the complete address"):
        MLflow(stored, "/o", system_metrics=False).add_artifacts("id", Artifacts([], "x"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole)
    assert tracking_uri(stored, Path("/o")) == whole
    assert tracking_uri("postgresql://u:***@other/db", Path("/o")) == "postgresql://u:***@other/db"


def test_the_suggested_command_is_quoted_and_names_no_password() -> None:
    words = shlex.split((view_command("sqlite:////a b/it's/mlflow.db", "3") or "").splitlines()[0])
    assert words[words.index("--backend-store-uri") + 1] == "sqlite:////a b/it's/mlflow.db"
    assert words[1:4] == [sys.executable, "-m", "mlflow"]
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert '--backend-store-uri "$MLFLOW_TRACKING_URI"' in view_command("postgresql://u:secret@host/db", "3")
    assert view_command("https://u:secret@host:5000/", "3").startswith("the address https://host:5000/#/experiments/3/runs")


def test_a_moved_output_root_takes_its_database_along(run, folder: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)  # where the run was started: its config says output_root=outputs
    old, new = tmp_path / "outputs", tmp_path / "new"
    old.mkdir()
    for name in ("default", "mlflow.db"):
        (tmp_path / name).rename(old / name)
    run("task=sync", f"run={old}", "tracking=mlflow", f"output_root={old}")
    old.rename(new)
    run_folder, file = new / "default" / "r", tmp_path / "table.txt"
    file.write_text("accuracy")
    additions = Artifacts([], "evaluate", metrics={"evaluate/knn": 0.5}, step=18)
    for root in (new, tmp_path / "elsewhere"):
        config = resolve(compose("tracking=mlflow", f"output_root={root}", f"run={run_folder}"))
        log_artifacts(config, run_folder, additions)
    (tracked,) = copies(f"sqlite:///{new}/mlflow.db", old / "default" / "r")
    assert tracked.data.metrics["evaluate/knn"] == 0.5
    assert f"MLflow at sqlite:///{tmp_path}/elsewhere/mlflow.db does not have this run" in caplog.text
    assert not old.exists()
    assert not (tmp_path / "elsewhere").exists()


def test_a_copied_run_folder_becomes_a_run_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prepare_database(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def track(folder: Path) -> str:
        tracker = MLflow(uri, str(tmp_path), system_metrics=False)
        run_id = tracker.start(folder, "e", {}, {}, [])
        assert tracker.finish("FINISHED")
        assert (folder / "run_id").read_text() == run_id
        return str(run_id)

    original, copy, moved = (tmp_path / name for name in ("a", "b", "c"))
    original.mkdir()
    first = track(original)
    shutil.copytree(original, copy)
    with pytest.raises(UserError, match="does not have this run; task=sync run=FOLDER sends it"):
        MLflow(uri, str(tmp_path), system_metrics=False).add_artifacts(first, Artifacts([], "evaluate", run=copy))
    second = track(copy)
    assert second != first
    assert (track(original), track(copy)) == (first, second), "from then on, both are known"
    original.rename(moved)
    assert track(moved) == first
    for folder in (copy, moved):
        (tracked,) = copies(uri, folder)
        assert "copy_of" not in tracked.data.tags
