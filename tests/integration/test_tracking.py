"""Trackers: no duplicates after a resume, the right final status, and no failure of training because of a tracker."""

import json
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from hjepa.config.errors import UserError
from hjepa.tracking import mlflow as track_mlflow
from hjepa.tracking.dead_runs import machine_tags, shares_locks
from hjepa.tracking.histograms import read_histograms
from hjepa.tracking.mlflow import MLflow
from hjepa.tracking.mlflow_server import PORT, view_command
from hjepa.tracking.run_folder import Record, RunFolder, read_records, try_lock
from hjepa.tracking.tensorboard import TensorBoard
from hjepa.tracking.tracker import Artifacts, Tracker, Trackers, log_artifacts
from tests.helpers.children import begin, launch
from tests.helpers.database import prepare_database
from tests.helpers.runs import tiny


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch) -> Callable[..., MLflow]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    prepare_database(tmp_path)

    def start(records: tuple = ()) -> MLflow:
        t = MLflow(uri=None, output_root=str(tmp_path), system_metrics=False)
        t.start(tmp_path / "run", "e", {f"p{i}": i for i in range(250)}, {"commit": "abc"}, list(records))
        return t

    return start


def client(tmp_path: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def history(client: mlflow.MlflowClient, run_id: str, key: str) -> list[int]:
    return sorted(m.step for m in client.get_metric_history(run_id, key))


def warnings_of_hjepa(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of hjepa itself, without what MLflow logs, which depends on the tests before."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("hjepa")]


def check_complete(client: mlflow.MlflowClient, folder: Path) -> None:
    """Check that the folder has one tracked run, which is finished and has every metric of metrics.jsonl once."""
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.run_folder = '{folder}'")
    assert run.info.status == "FINISHED"
    records = read_records(folder)
    assert records
    for key in {key for record in records for key in record} - {"step"}:
        assert history(client, run.info.run_id, key) == [r["step"] for r in records if key in r], key
    files = {f.path for folder in (None, "plots") for f in client.list_artifacts(run.info.run_id, folder)}
    assert {"config.yaml", "summary.json", "plots/curves.png", "plots/masks.png"} <= files


class Failing(Tracker):
    """A tracker that cannot take metrics, and lacks one of two runs."""

    def __init__(self) -> None:
        self.added: list[str] = []

    def log(self, record: Record) -> None:
        raise RuntimeError("no space")

    def add_artifacts(self, run_id: str, artifacts: Artifacts) -> None:
        if run_id == "deleted":
            raise UserError("it does not have this run")
        self.added.append(run_id)


def test_what_a_task_added_to_a_run_in_tensorboard_survives_its_next_session(tmp_path: Path) -> None:
    def write_session() -> list[str]:
        board = TensorBoard()
        board.start(tmp_path, "e", {}, {}, [])
        board.finish("FINISHED")
        return sorted(path.name for path in (tmp_path / "tensorboard").iterdir())

    (first,) = write_session()
    TensorBoard().add_artifacts("", Artifacts([], "evaluate", metrics={"linear": 0.5}, run=tmp_path))
    files = write_session()
    assert len(files) == 2
    assert first not in files
    assert any(name.endswith(".evaluate.metrics") for name in files)


def test_what_a_failed_tracker_missed_was_not_sent() -> None:
    trackers = Trackers({"failing": Failing(), "working": Tracker()})
    assert trackers.finish("FINISHED")
    trackers.log({"step": 0})
    assert not trackers.finish("FINISHED")


def test_a_run_that_a_tracker_lacks_does_not_keep_others_from_it(caplog) -> None:
    tracker = Failing()
    trackers = Trackers({"failing": tracker})
    for run_id in ("deleted", "kept"):
        trackers.add_artifacts(run_id, Artifacts([], "sweep"))
    assert tracker.added == ["kept"]
    assert "sweep/ was not added to the tracked run deleted: it does not have this run" in caplog.text


def test_everything_arrives_once(tracker, tmp_path: Path) -> None:
    t = tracker()
    for step in range(1200):
        t.log({"step": step, "loss": 1.0 / (step + 1)})
    assert t.finish("FINISHED")
    run = client(tmp_path).get_run(t.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 250
    assert run.data.tags["commit"] == "abc"
    assert run.data.tags["run_folder"] == str(tmp_path / "run")
    assert history(client(tmp_path), t.run_id, "loss") == list(range(1200))


@pytest.mark.parametrize("id_is_known", [True, False])
def test_a_resumed_run_sends_only_what_is_missing(tracker, tmp_path: Path, id_is_known: bool) -> None:
    first = tracker()
    for step in range(10):
        first.log({"step": step, "loss": 0.0})
    first.flush()
    first.thread.shutdown()  # as if the process died: the run is still listed as running
    if not id_is_known:
        (tmp_path / "run" / "run_id").unlink()  # as if it died before it wrote the id
    second = tracker([{"step": step, "loss": 0.0, "late": 1.0} for step in range(7)])  # rewound to the last checkpoint
    assert second.run_id == first.run_id
    for step in range(7, 15):
        second.log({"step": step, "loss": 0.0, "late": 1.0})
    second.finish("FINISHED")
    assert history(client(tmp_path), first.run_id, "loss") == list(range(15))
    assert history(client(tmp_path), first.run_id, "late") == list(range(15))


def test_an_unreachable_server_is_reported_once_and_stops_nothing(run, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        run("tracking=mlflow", "tracking.mlflow.uri=http://127.0.0.1:9", "name=r")
    assert ["the run goes on" in warning for warning in warnings_of_hjepa(caplog)] == [True]
    folder = tmp_path / "default" / "r"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert len(read_records(folder)) > 5
    with pytest.raises(UserError, match="1 of 1 runs could not be sent"):
        run("task=sync", f"run={folder}", "tracking=mlflow", "tracking.mlflow.uri=http://127.0.0.1:9")


def use_database(root: Path, name: str) -> None:
    """Track a run from start to end; called in a process of its own."""
    t = MLflow(uri=None, output_root=str(root), system_metrics=False)
    (root / name).mkdir(parents=True)
    t.start(root / name, "e", {"a": 1}, {}, [])
    for step in range(50):
        t.log({"step": step, "x": 1.0})
    assert t.finish("FINISHED")


@pytest.mark.thorough
def test_eight_jobs_can_create_a_database_at_the_same_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".mlflow.db.tmp").write_bytes(b"of a process that was killed while it created the database")
    processes = [begin(use_database, tmp_path, f"run{i}") for i in range(8)]
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0] * 8
    runs = client(tmp_path).search_runs([client(tmp_path).get_experiment_by_name("e").experiment_id])
    assert sorted((r.info.run_name, r.info.status) for r in runs) == [(f"run{i}", "FINISHED") for i in range(8)]
    assert all(history(client(tmp_path), r.info.run_id, "x") == list(range(50)) for r in runs)


# -- a server ----------------------------------------------------------------------------------------------------------


class Server:
    """The server that a run suggests, on a free port of the loopback interface; it can be killed and restarted."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.root, self.uri = root, f"http://127.0.0.1:{self.port}"
        self.client = mlflow.MlflowClient(self.uri)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = view_command(f"sqlite:///{self.root}/server.db", "0").splitlines()[0]
        files = shlex.quote(str(self.root / "files"))
        self.process = subprocess.Popen(
            command.replace(f"--port {PORT}", f"--port {self.port}") + f" --artifacts-destination {files}",
            shell=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            try:
                self.client.search_experiments()
                return
            except mlflow.MlflowException:
                time.sleep(0.2)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        """Kill the server without a shutdown."""
        os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    root = tmp_path / "it's a folder"
    root.mkdir()
    server = Server(root)
    server.start()
    yield server
    server.kill()


@pytest.mark.thorough
def test_a_server_that_fails_and_returns(server: Server, run, tmp_path: Path, monkeypatch, caplog) -> None:
    """A run that ends in the meantime is sent by task=sync, also twice; a run that goes on sends what is missing itself."""
    folder, other = tmp_path / "default" / "r", tmp_path / "other"
    for run_folder in (folder, other):
        (run_folder / "plots").mkdir(parents=True)
    survivor = MLflow(server.uri, str(tmp_path), system_metrics=False)
    survivor.start(other, "default", {"a": 1}, {}, [])

    def record(step: int) -> None:
        with (other / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "x": 1.0}) + "\n")
        survivor.log({"step": step, "x": 1.0})

    def kill_in_the_middle() -> None:
        while len(read_records(folder)) < 4:
            time.sleep(0.005)
        server.kill()

    for step in range(5):
        record(step)
    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    tracking = ("tracking=mlflow", f"tracking.mlflow.uri={server.uri}")
    with caplog.at_level(logging.WARNING):
        run(*tracking, "name=r", "train.epochs=4", "train.log_every=1")
    killer.join()
    assert ["task=sync run=" in warning for warning in warnings_of_hjepa(caplog)] == [True], "reported once"
    for step in range(5, 10):
        record(step)
    server.start()
    monkeypatch.setattr(track_mlflow, "RETRY_SECONDS", 0.0)
    record(10)
    assert survivor.finish("FINISHED")
    assert history(server.client, survivor.run_id, "x") == list(range(11))
    assert server.client.get_run(survivor.run_id).info.status == "FINISHED"
    for _ in range(2):
        run("task=sync", f"run={tmp_path}/default", *tracking)
        check_complete(server.client, folder)


def test_the_same_command_sends_a_run_that_was_killed_at_its_end(run, tmp_path: Path, monkeypatch) -> None:
    prepare_database(tmp_path)
    monkeypatch.setattr(MLflow, "finish", lambda self, status: self.thread.shutdown() or False)
    run("tracking=mlflow", "name=r")
    monkeypatch.undo()
    run("tracking=mlflow", "name=r")
    check_complete(client(tmp_path), tmp_path / "default" / "r")


@pytest.mark.thorough
def test_sync_copies_a_run_to_another_database(run, tmp_path: Path, capsys) -> None:
    run("name=r")
    folder = tmp_path / "default" / "r"
    for name in ("a", "b", "b", "a"):
        run("task=sync", f"run={folder}", "tracking=mlflow", f"tracking.mlflow.uri=sqlite:///{tmp_path}/{name}.db")
    for name in ("a", "b"):
        check_complete(mlflow.MlflowClient(f"sqlite:///{tmp_path}/{name}.db"), folder)
    assert "records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking=mlflow"], "needs a run folder"),
        (["tracking=none", "run=x"], "nothing to send to"),
        (["tracking=mlflow", "run=/nowhere"], "holds no run"),
    ],
)
def test_sync_explains_what_it_lacks(run, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("task=sync", *overrides)


# -- statuses ----------------------------------------------------------------------------------------------------------


def test_the_start_of_a_run_closes_dead_runs_and_no_others(tracker, tmp_path: Path) -> None:
    t = tracker()
    t.finish("FINISHED")
    c, experiment = client(tmp_path), t.experiment_id
    cases = {
        "dead": "KILLED",
        "failed": "FAILED",
        "alive": "RUNNING",
        "elsewhere": "RUNNING",
        "gone": "RUNNING",
        "replaced": "KILLED",
        "x" * 300: "RUNNING",  # its folder raises an OSError, as that of another user does
    }
    ids = {}
    for name in cases:
        folder = tmp_path / name
        tags = {"run_folder": str(folder)} | (machine_tags() if name != "elsewhere" else {"host": "another", "boot": "x"})
        ids[name] = c.create_run(experiment, tags=tags).info.run_id
        if name not in ("gone", "x" * 300):
            folder.mkdir()
            (folder / ".lock").touch()
            (folder / "run_id").write_text("another" if name == "replaced" else ids[name])
    (tmp_path / "failed" / "summary.json").write_text('{"status": "failed"}')
    with try_lock(tmp_path / "alive"):
        second = MLflow(uri=None, output_root=str(tmp_path), system_metrics=False)
        (tmp_path / "second").mkdir()
        second.start(tmp_path / "second", "another experiment", {}, {}, [])
        second.finish("FINISHED")
    assert {name: c.get_run(run_id).info.status for name, run_id in ids.items()} == cases


MOUNT_TABLES = {
    "server:/home /home nfs4 rw,vers=4.2,local_lock=none 0 0": True,
    "server:/home /home nfs rw,local_lock=all 0 0": False,
    "server:/home /home nfs rw,nolock 0 0": False,
    "mds:/x /home lustre rw,flock 0 0": True,
    "mds:/x /home lustre rw 0 0": False,
    "/dev/sda1 /home ext4 rw 0 0": False,
    "server:/ / nfs4 rw 0 0\ntmpfs /home tmpfs rw 0 0": False,
}


@pytest.mark.parametrize(("table", "shared"), MOUNT_TABLES.items())
def test_file_systems_that_share_locks_between_machines(tmp_path: Path, table: str, shared: bool) -> None:
    (tmp_path / "mounts").write_text(f"/dev/root / ext4 rw 0 0\n{table}\n")
    assert shares_locks(Path("/home/user/outputs/e/r"), tmp_path / "mounts") is shared


def claim_and_fork(folder: Path) -> None:
    """Claim a folder, fork a worker that continues to run, and exit."""
    RunFolder(folder, {}).claim(overwrite=True)
    if os.fork() == 0:
        time.sleep(20)
    os._exit(0)


def test_an_orphaned_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    process = begin(claim_and_fork, tmp_path / "r")
    process.join(60)
    with try_lock(tmp_path / "r") as is_free:
        assert is_free


# -- other trackers ----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_several_trackers_at_once(run, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prepare_database(tmp_path)
    options = ("tracking=[mlflow,tensorboard]", "name=r", "train.histograms=1")
    run(*options)
    folder = tmp_path / "default" / "r"
    check_complete(client(tmp_path), folder)
    (folder / "summary.json").unlink()
    run(*options)  # a second session
    check_complete(client(tmp_path), folder)
    shutil.copy(folder / "plots" / "masks.png", tmp_path / "pca.png")
    for _ in range(2):  # task=visualize, repeated
        artifacts = Artifacts([tmp_path / "pca.png"], "visualize", metrics={"evaluate/knn": 0.5}, step=18)
        log_artifacts({"tracking": {"tensorboard": {}}}, folder, artifacts)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
    assert {tag: len(events.Images(tag)) for tag in events.Tags()["images"]} == dict.fromkeys(
        ("plots/masks", "plots/curves", "visualize/pca"), 1
    )
    names = {name for name, _ in read_histograms(folder / "histograms" / "00000018.npz")[1]}
    assert {"weights/student.norm.weight", "gradients/student.norm.weight"} <= names
    assert set(events.Tags()["histograms"]) == names
    assert [event.step for event in events.Histograms("gradients/student.norm.weight")] == [9, 18]
    assert [event.step for event in events.Scalars("evaluate/knn")] == [18]
    records = read_records(folder)
    for key in {key for record in records for key in record} - {"step"}:
        assert [e.step for e in events.Scalars(key)] == [r["step"] for r in records if key in r], key


@pytest.mark.thorough
def test_offline_wandb_keeps_one_run_in_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]' to test it")
    """Mode and project come from the variables of W&B; the pictures and histograms are in the run as well."""
    folder = tmp_path / "default" / "r"
    options = tiny("tracking=wandb", "train.epochs=1", "train.histograms=1", f"output_root={tmp_path}", "name=r")
    for _ in range(2):
        ended = launch(*options, WANDB_MODE="offline", WANDB_PROJECT="project-of-the-environment")
        assert ended.returncode == 0, ended.stderr
        assert "left out" not in ended.stdout
        (written,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
        assert b"project-of-the-environment" in written.read_bytes()
        assert b"gradients/student.norm.weight" in written.read_bytes()
        pictures = sorted(path.name.split("_")[0] for path in written.parent.glob("files/media/images/plots/*.png"))
        assert pictures == ["curves", "masks"]
        assert (folder / "wandb" / "id").read_text() in written.name
        (folder / "summary.json").unlink()


@pytest.mark.parametrize("package", ["mlflow", "tensorboard", "wandb"])
def test_a_missing_package_is_reported_before_training(run, tmp_path: Path, monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"tracking={package} needs the package {package}; pip install {package}"):
        run(f"tracking={package}")
    assert not list(tmp_path.iterdir())


def test_a_failing_tracker_is_left_out(run, tmp_path: Path, monkeypatch, caplog) -> None:
    from hjepa.tracking.tensorboard import TensorBoard

    def broken(self: TensorBoard, record: dict) -> None:
        raise OSError(28, "No space left on device")

    prepare_database(tmp_path)
    monkeypatch.setattr(TensorBoard, "log", broken)
    with caplog.at_level(logging.WARNING):
        run("tracking=[mlflow,tensorboard]", "name=r")
    assert ["tracking=tensorboard failed" in warning for warning in warnings_of_hjepa(caplog)] == [True]
    check_complete(client(tmp_path), tmp_path / "default" / "r")
