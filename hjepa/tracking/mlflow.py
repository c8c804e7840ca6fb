"""MLflow: a database in the output root, or a tracking server.

A thread of its own sends everything, so that training never waits. If the server fails, the run logs one warning and goes on.
It tries again from time to time and at its end: it asks the server for the points that it has, and sends the missing ones from
metrics.jsonl, so that nothing is lost or duplicated.
"""

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hjepa.config.errors import UserError, first_line, import_optional
from hjepa.config.passwords import HIDDEN, hide_passwords
from hjepa.config.paths import PROGRAM
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.dead_runs import close_dead_runs, end_run, machine_tags
from hjepa.tracking.mlflow_models import onnx_options
from hjepa.tracking.mlflow_runs import belongs_to_another_folder, create_run, find_run, find_run_of_folder
from hjepa.tracking.mlflow_server import database_file, database_lock, find_experiment, tracking_uri, view_command
from hjepa.tracking.run_folder import Record, read_records, read_run_id
from hjepa.tracking.tracker import Artifacts, Tracker

log = logging.getLogger(__name__)

METRICS_PER_REQUEST = 500  # MLflow allows 1000

PARAMS_PER_REQUEST = 100  # as many as MLflow allows

RETRY_SECONDS = 60.0  # between attempts to reach a server that failed

ARTIFACT_FOLDERS = {  # by pattern in the run folder
    "config.yaml": None,
    "summary.json": None,
    "plots/*.png": "plots",
    "histograms/*.npz": "histograms",
}

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the defaults, 7 retries and 120 seconds, delay the end of a run by minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

Point = tuple[str, int]  # name and step of a metric


class MLflow(Tracker):
    """MLflow on the server that MLFLOW_TRACKING_URI names, or on the database `mlflow.db` in the output root.

    Args:
        uri: Tracking URI. None: MLFLOW_TRACKING_URI or, if that is not set, the database.
        output_root: Folder of the database and its artifacts.
        system_metrics: Record the use of CPU, memory and GPU.
        register: Name of the registered model that an export to ONNX becomes a version of; None registers nothing.
    """

    def __init__(self, uri: str | None, output_root: str, system_metrics: bool, register: str | None = None) -> None:
        self.root = Path(output_root).expanduser().absolute()
        self.uri = tracking_uri(uri, self.root)
        self.system_metrics, self.register = system_metrics, register
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.mlflow = import_optional("mlflow", "tracking=mlflow", "use tracking=none")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        for name in ("mlflow.system_metrics", "urllib3.connectionpool"):  # `call_safely` reports a failed server, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.last_task: Future[bool] | None = None
        self.client: Any = None  # created in `open_run`, since its constructor already creates the database
        self.description: tuple[str, dict[str, Any], dict[str, str]] = "", {}, {}  # experiment, params and tags of the run
        self.folder, self.run_id, self.experiment_id = Path(), "", ""
        self.is_open = False  # whether the server has the run with its description
        self.monitor: Any = None
        self.pending: list[tuple[int, Record]] = []  # records with their time in milliseconds
        self.sent_points: set[Point] = set()  # points that the server already has of records that are yet to be sent
        self.last_step = 0
        self.failed_at: float | None = None  # time at which the server failed; None while it works
        self.has_warned = False

    # -- called by the run ---------------------------------------------------------------------------------------------

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        self.folder = folder
        self.last_step = records[-1]["step"] if records else 0
        self.description = experiment, params, tags
        if self.call_safely("starting a run", self.open_run):
            self.submit("starting system metrics", self.start_system_metrics)
            self.submit("sending metrics", self.send_missing, records, self.last_step)
            self.submit("closing dead runs", lambda: close_dead_runs(self.client))
        return self.run_id or None

    def log(self, record: Record) -> None:
        self.pending.append((milliseconds(), record))
        self.last_step = record["step"]
        if self.last_task is None or self.last_task.done():
            self.flush()

    def flush(self) -> None:
        """Pass pending records to the thread; while the server is unreachable, they remain in metrics.jsonl only."""
        batch, self.pending = self.pending, []
        if self.failed_at is None:
            self.submit("sending metrics", self.send, batch)
        elif time.monotonic() - self.failed_at > RETRY_SECONDS:
            self.last_task = self.thread.submit(self.recover)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self.submit(f"sending {path.name}", self.send_file, path, folder)

    def finish(self, status: str) -> bool:
        self.flush()
        self.thread.submit(self.stop_system_metrics)
        self.submit("ending the run", self.end, status)
        self.thread.submit(self.recover, status)
        self.thread.shutdown(wait=True)
        return self.failed_at is None

    def log_histograms(self, file: Path) -> None:
        self.log_artifact(file, "histograms")

    def add_artifacts(self, run_id: str, artifacts: Artifacts) -> None:
        client, run = self.find_existing(run_id, artifacts.run)
        run_id, existing = run.info.run_id, run.data.metrics
        for key, value in artifacts.tags.items():
            client.set_tag(run_id, key, value)
        metrics = [
            self.mlflow.entities.Metric(key, value, milliseconds(), artifacts.step)
            for key, value in artifacts.metrics.items()
            if existing.get(key) != value
        ]
        for batch in batches(metrics, METRICS_PER_REQUEST):
            client.log_batch(run_id, metrics=batch)
        for file in artifacts.files:
            client.log_artifact(run_id, str(file), artifacts.folder)

    def register_model(self, run_id: str, folder: Path) -> str:
        """Log an exported ONNX encoder to its run, and make it a version of the registered model; return its model URI.

        Args:
            run_id: Id of the run.
            folder: Export folder with `encoder.onnx` and `preprocess.json`.

        Raises:
            UserError: MLflow does not have the run.
        """
        _, run = self.find_existing(run_id, folder.parent)
        self.set_uri()
        options = {"name": "encoder", "registered_model_name": self.register, "run_id": run.info.run_id} | onnx_options(folder)
        model = self.mlflow.models.Model.log(None, self.mlflow.onnx, **options)
        return f"models:/{self.register}/{model.registered_model_version}"

    def view_command(self) -> str | None:
        return view_command(self.uri, self.experiment_id) if self.experiment_id else None

    # -- failures of the server ----------------------------------------------------------------------------------------

    def submit(self, action: str, call: Callable[..., None], *args: Any) -> None:
        """Call a function in the thread, after all functions that were submitted before."""
        self.last_task = self.thread.submit(self.call_safely, action, call, *args)

    def call_safely(self, action: str, call: Callable[..., None], *args: Any) -> bool:
        """Call a function unless the server has failed before, and return whether the server works."""
        if self.failed_at is None:
            try:
                call(*args)
            except Exception as error:  # the client may raise anything, and training must go on
                self.failed_at = time.monotonic()
                if not self.has_warned:
                    reason = str(error) if isinstance(error, UserError) else first_line(error)
                    address = hide_passwords(self.uri)
                    option = f" tracking.mlflow.uri={shlex.quote(address)}" if address == self.uri else ""
                    log.warning(
                        "MLflow at %s: %s failed (%s); the run goes on, and metrics.jsonl keeps everything. What is missing "
                        "at the end of the run can be sent later: %s task=sync run=%s%s",
                        *(address, action, hide_passwords(reason), PROGRAM, shlex.quote(str(self.folder)), option),
                    )
                self.has_warned = True
        return self.failed_at is None

    def recover(self, status: str | None = None) -> bool:
        """If the server has failed, send everything that it lacks; with a status, also end the run."""
        if self.failed_at is None:
            return True
        self.failed_at = None
        return self.call_safely("sending what was missed", self.catch_up, status)

    def catch_up(self, status: str | None) -> None:
        """Send everything that the server lacks; with a status, also end the run."""
        since = self.last_step
        if not self.is_open:
            self.open_run()
        if not status:
            self.start_system_metrics()
        self.send_missing(read_records(self.folder), since)
        if status:  # before the files, which the server may be unable to store
            self.end(status)
        for pattern, folder in ARTIFACT_FOLDERS.items():
            for path in sorted(self.folder.glob(pattern)):
                self.send_file(path, folder)
        log.info("MLflow at %s has everything now", hide_passwords(self.uri))

    # -- requests ------------------------------------------------------------------------------------------------------

    def open_run(self) -> None:
        """Find or create the experiment and the run."""
        experiment, params, tags = self.description
        self.set_uri()  # for the system metrics
        self.client = self.connect()
        with database_lock(self.uri):
            self.experiment_id = find_experiment(self.client, self.uri, experiment, self.root)
        tags = tags | machine_tags() | {"run_folder": str(self.folder)}
        known_id = read_run_id(self.folder)
        run = find_run_of_folder(self.client, self.experiment_id, known_id, tags)
        if run and belongs_to_another_folder(run, self.folder):
            known_id = None
            run = find_run_of_folder(self.client, self.experiment_id, known_id, tags)
        if not run:
            copy_of = {"copy_of": known_id} if known_id else {}
            run = create_run(self.client, self.experiment_id, self.folder, params, tags | copy_of)
        self.run_id = str(run.info.run_id)
        if not known_id:
            atomic_write(self.folder / "run_id", self.run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        self.send_description(params, tags, run.data.params)
        self.is_open = True

    def start_system_metrics(self) -> None:
        """Start to send system metrics; needed again after a failure of the server, which stops MLflow's monitor."""
        self.stop_system_metrics()
        if self.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)  # type: ignore[no-untyped-call]
            self.monitor.start()

    def stop_system_metrics(self) -> None:
        """Stop to send system metrics; a monitor that is left alone would go on beside the next one."""
        if self.monitor:
            self.monitor.finish()
            self.monitor = None

    def connect(self) -> Any:
        """Return a client, with the database created.

        Raises:
            UserError: The password of the address is missing.
        """
        if HIDDEN in self.uri:
            raise UserError(
                f"the password of {self.uri} is not stored with the run; set MLFLOW_TRACKING_URI to the complete address"
            )
        with database_lock(self.uri):
            return self.mlflow.MlflowClient(self.uri)

    def find_existing(self, run_id: str, folder: Path | None) -> tuple[Any, Any]:
        """Return a client and a run or its copy, or raise a UserError; a database that does not exist is not created.

        Args:
            run_id: Id of the run.
            folder: Its run folder, if it is known.
        """
        file = database_file(self.uri)
        client = self.connect() if not file or file.exists() else None
        run = find_run(client, run_id) if client and run_id else None
        if not run or (folder and belongs_to_another_folder(run, folder)):
            raise UserError(
                f"MLflow at {hide_passwords(self.uri)} does not have this run; task=sync run=FOLDER sends it, and then "
                "this command can be repeated"
            )
        return client, run

    def set_uri(self) -> None:
        """Make the address that of MLflow's functions which take none."""
        variable = os.environ.get("MLFLOW_TRACKING_URI")
        self.mlflow.set_tracking_uri(self.uri)
        if variable is None:  # MLflow sets this variable, which the next job of a sweep would read
            os.environ.pop("MLFLOW_TRACKING_URI", None)

    def send_description(self, params: dict[str, Any], tags: dict[str, str], existing_params: dict[str, str]) -> None:
        """Send the tags, and the parameters that the server lacks."""
        entities = self.mlflow.entities
        missing = [entities.Param(key, str(value)[:6000]) for key, value in params.items() if key not in existing_params]
        self.client.log_batch(self.run_id, tags=[entities.RunTag(key, value) for key, value in tags.items()])
        for batch in batches(missing, PARAMS_PER_REQUEST):
            self.client.log_batch(self.run_id, params=batch)

    def send_missing(self, records: list[Record], since: int) -> None:
        """Send the points of the records that the server lacks.

        Points from step `since` on are remembered, because records of these steps may also be pending.
        """
        keys = [key for key in self.client.get_run(self.run_id).data.metrics if not key.startswith("system/")]
        self.sent_points = {(key, m.step) for key in keys for m in self.client.get_metric_history(self.run_id, key)}
        self.send([(milliseconds(), record) for record in records])
        sent_now = {(key, record["step"]) for record in records for key in record}
        self.sent_points = {(key, step) for key, step in self.sent_points | sent_now if step >= since}

    def send(self, timed_records: list[tuple[int, Record]]) -> None:
        """Send pairs of a time in milliseconds and a record."""
        metrics = [
            self.mlflow.entities.Metric(key, value, time_ms, record["step"])
            for time_ms, record in timed_records
            for key, value in record.items()
            if key != "step" and (key, record["step"]) not in self.sent_points
        ]
        for batch in batches(metrics, METRICS_PER_REQUEST):
            self.client.log_batch(self.run_id, metrics=batch)

    def send_file(self, path: Path, folder: str | None) -> None:
        """Send a file if it exists."""
        if path.exists():
            self.client.log_artifact(self.run_id, str(path), folder)

    def end(self, status: str) -> None:
        """Set the final status."""
        end_run(self.client, self.run_id, self.folder, status)


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def milliseconds() -> int:
    """Return the milliseconds since 1970, MLflow's unit of time."""
    return int(time.time() * 1000)
