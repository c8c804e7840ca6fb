"""MLflow: a database in the output root, or a server.

Everything is sent from a thread of its own. When the server fails, the run says so once and goes on; from time to time, and at
the end, what the server lacks is looked up and sent from metrics.jsonl, so nothing is lost and no point is there twice.
"""

import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from hjepa.config.errors import first_line, import_optional
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.dead_runs import close_dead_runs, end_run, machine_tags
from hjepa.tracking.run_folder import Record, read_records
from hjepa.tracking.tracker import Artifacts, Tracker

log = logging.getLogger(__name__)

BATCH = 500  # metrics per request; MLflow allows 1000

RETRY_SECONDS = 60.0  # between attempts to reach a server that failed

PLACES = {"config.yaml": None, "summary.json": None, "plots/*.png": "plots"}  # files of a run folder, and where they go

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the usual 7 and 120 hold a run up for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

Pair = tuple[str, int]  # a metric's name and step


class MLflow(Tracker):
    """MLflow on a database, by default `mlflow.db` in the output root, or the server that MLFLOW_TRACKING_URI names.

    Args:
        uri: tracking URI, or None for MLFLOW_TRACKING_URI or the database.
        output_root: where the database and the artifacts go.
        system_metrics: record CPU, memory and GPU use.
    """

    def __init__(self, uri: str | None, output_root: str, system_metrics: bool) -> None:
        self.root = Path(output_root).expanduser().absolute()
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root}/mlflow.db"
        self.system_metrics = system_metrics
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self.mlflow = import_optional("mlflow", "tracking=mlflow", "use tracking=none")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        for name in ("mlflow.system_metrics", "urllib3.connectionpool"):  # we say ourselves, once, that a server is gone
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.job: Future[bool] | None = None
        self.client: Any = None  # its constructor already creates the database
        self.opening: Callable[[], None] = lambda: None
        self.folder, self.run_id, self.experiment_id = Path(), "", ""
        self.monitor: Any = None
        self.pending: list[tuple[int, Record]] = []
        self.have: set[Pair] = set()  # what the server has of coming records
        self.last_step = 0
        self.failed_at: float | None = None  # when the server failed; None while it works
        self.warned = False

    # -- the run's side ------------------------------------------------------------------------------------------------

    def start(
        self, folder: Path, experiment: str, params: dict[str, Any], tags: dict[str, str], records: list[Record]
    ) -> str | None:
        self.folder = folder
        self.last_step = records[-1]["step"] if records else 0
        self.opening = partial(self.open, experiment, params, tags)
        if self.attempt("starting a run", self.opening):
            self.submit("sending metrics", self.send_missing, records, self.last_step)
            self.submit("closing dead runs", lambda: close_dead_runs(self.client))
        return self.run_id or None

    def log(self, record: Record) -> None:
        self.pending.append((now(), record))
        self.last_step = record["step"]
        if self.job is None or self.job.done():
            self.flush()

    def flush(self) -> None:
        """Hand what is pending to the thread; while the server is away, leave it to metrics.jsonl."""
        batch, self.pending = self.pending, []
        if self.failed_at is None:
            self.submit("sending metrics", self.send, batch)
        elif time.monotonic() - self.failed_at > RETRY_SECONDS:
            self.job = self.thread.submit(self.recover)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.submit(f"sending {path.name}", self.send_file, path, folder)

    def finish(self, status: str) -> bool:
        self.flush()
        if self.monitor:
            self.monitor.finish()
        self.submit("ending the run", self.end, status)
        self.thread.submit(self.recover, status)
        self.thread.shutdown(wait=True)
        return self.failed_at is None

    def add_artifacts(self, run_id: str, addition: Artifacts) -> None:
        client = self.mlflow.MlflowClient(self.uri)
        for key, value in addition.tags.items():
            client.set_tag(run_id, key, value)
        there = client.get_run(run_id).data.metrics if addition.metrics else {}
        new = [
            self.mlflow.entities.Metric(key, value, now(), addition.step)
            for key, value in addition.metrics.items()
            if there.get(key) != value
        ]
        for i in range(0, len(new), BATCH):
            client.log_batch(run_id, metrics=new[i : i + BATCH])
        for file in addition.files:
            client.log_artifact(run_id, str(file), addition.folder)

    def view_command(self) -> str | None:
        if not self.uri.startswith("sqlite"):
            return f"the address {self.uri} into a browser"
        return (
            f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {sys.executable} -m mlflow server --backend-store-uri {self.uri} "
            f"--host 127.0.0.1 --port 5000 --workers 1\n  and open "
            f"http://127.0.0.1:5000/#/experiments/{self.experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
        )

    # -- faults --------------------------------------------------------------------------------------------------------

    def submit(self, what: str, call: Callable[..., None], *args: Any) -> None:
        """Call in the thread, in order."""
        self.job = self.thread.submit(self.attempt, what, call, *args)

    def attempt(self, what: str, call: Callable[..., None], *args: Any) -> bool:
        """Call, unless the server failed before; returns whether it worked."""
        if self.failed_at is None:
            try:
                call(*args)
            except Exception as error:  # whatever a server does, training goes on
                self.failed_at = time.monotonic()
                if not self.warned:
                    log.warning(
                        "MLflow at %s: %s failed (%s); the run goes on, metrics.jsonl keeps everything. What is missing in "
                        "the end can be sent later: python launch.py task=sync run=%s tracking.mlflow.uri=%s",
                        *(self.uri, what, first_line(error), self.folder, self.uri),
                    )
                self.warned = True
        return self.failed_at is None

    def recover(self, status: str | None = None) -> bool:
        """After a fault, send what the server lacks; with a status, also end the run."""
        if self.failed_at is None:
            return True
        self.failed_at = None
        return self.attempt("sending what was missed", self.catch_up, status)

    def catch_up(self, status: str | None) -> None:
        """Find out what the server lacks and send it."""
        since = self.last_step
        if not self.run_id:
            self.opening()
        elif not status:
            self.watch_system()
        self.send_missing(read_records(self.folder), since)
        for pattern, place in PLACES.items():
            for path in sorted(self.folder.glob(pattern)):
                self.send_file(path, place)
        if status:
            self.end(status)
        log.info("MLflow at %s has everything now", self.uri)

    # -- what is sent --------------------------------------------------------------------------------------------------

    def open(self, experiment: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Find or create experiment and run."""
        before = os.environ.get("MLFLOW_TRACKING_URI")
        self.mlflow.set_tracking_uri(self.uri)  # for the system metrics
        if before is None:  # MLflow writes it to the environment, where the next job of a sweep would find it
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        with self.first_use():
            self.client = self.mlflow.MlflowClient(self.uri)
            self.experiment_id = self.find_experiment(experiment)
        tags = tags | machine_tags() | {"run_folder": str(self.folder)}
        file = self.folder / "run_id"
        known = file.read_text() if file.exists() else None
        run = self.find_run(known, tags) or self.create_run(known, tags)
        self.run_id = str(run.info.run_id)
        if not known:
            atomic_write(file, self.run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        self.describe(params, tags, run.data.params)
        self.watch_system()

    def watch_system(self) -> None:
        """Begin to send system metrics; MLflow's monitor ends for good when the server fails."""
        if self.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)  # type: ignore[no-untyped-call]
            self.monitor.start()

    @contextlib.contextmanager
    def first_use(self) -> Iterator[None]:
        """One at a time: two first users of a fresh database would break it. A server sees to this itself."""
        if not self.uri.startswith("sqlite:///"):
            yield
            return
        place = Path(self.uri.removeprefix("sqlite:///")).parent
        place.mkdir(parents=True, exist_ok=True)
        with (place / ".mlflow.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def find_experiment(self, name: str) -> str:
        """The id of the experiment, created if it is not there."""
        found = self.client.get_experiment_by_name(name)
        if not found:
            local = str(self.root / "mlartifacts") if self.uri.startswith("sqlite") else None
            try:
                return str(self.client.create_experiment(name, artifact_location=local))
            except self.mlflow.MlflowException:  # on a server, another run may have been faster
                found = self.client.get_experiment_by_name(name)
                if not found:
                    raise
        return str(found.experiment_id)

    def find_run(self, known: str | None, tags: dict[str, str]) -> Any:
        """The run that an earlier sitting has left here, None if there is none.

        That is the known one, or the copy of it that another server has; without a known one (a crash may have come before its
        id was kept) one of this folder and config that still counts as running.
        """
        if known:
            try:
                run = self.client.get_run(known)
                if run.info.lifecycle_stage == "active":
                    return run
            except self.mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            wanted = f"tags.copy_of = '{known}'"
        else:
            same = [f"tags.{key} = '{tags[key]}'" for key in ("run_folder", "config") if key in tags]
            wanted = " and ".join([*same, "attributes.status = 'RUNNING'"])
        return next(iter(self.client.search_runs([self.experiment_id], wanted, max_results=1)), None)

    def create_run(self, known: str | None, tags: dict[str, str]) -> Any:
        """A new run; one that the folder knows under another id (of another server) is noted."""
        from mlflow.tracking.context import registry

        own = registry.resolve_tags(tags | ({"copy_of": known} if known else {}))
        return self.client.create_run(self.experiment_id, tags=own, run_name=self.folder.name)

    def describe(self, params: dict[str, Any], tags: dict[str, str], there: dict[str, str]) -> None:
        """Send tags, and the parameters that are not there, 100 to a request as MLflow allows."""
        entities = self.mlflow.entities
        new = [entities.Param(key, str(value)[:6000]) for key, value in params.items() if key not in there]
        self.client.log_batch(self.run_id, tags=[entities.RunTag(key, value) for key, value in tags.items()])
        for i in range(0, len(new), 100):
            self.client.log_batch(self.run_id, params=new[i : i + 100])

    def send_missing(self, records: list[Record], since: int) -> None:
        """Send what the server lacks of the records; remember what it has from step `since` on, lest it comes again."""
        keys = [key for key in self.client.get_run(self.run_id).data.metrics if not key.startswith("system/")]
        self.have = {(key, m.step) for key in keys for m in self.client.get_metric_history(self.run_id, key)}
        self.send([(now(), record) for record in records])
        sent = {(key, record["step"]) for record in records for key in record}
        self.have = {(key, step) for key, step in self.have | sent if step >= since}

    def send(self, stamped: list[tuple[int, Record]]) -> None:
        """Send (time in ms, record) pairs."""
        metrics = [
            self.mlflow.entities.Metric(key, value, time_ms, record["step"])
            for time_ms, record in stamped
            for key, value in record.items()
            if key != "step" and (key, record["step"]) not in self.have
        ]
        for i in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[i : i + BATCH])

    def send_file(self, path: Path, folder: str | None) -> None:
        """Send a file, if it is there."""
        if path.exists():
            self.client.log_artifact(self.run_id, str(path), folder)

    def end(self, status: str) -> None:
        """Set the final status."""
        end_run(self.client, self.run_id, self.folder, status)


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
