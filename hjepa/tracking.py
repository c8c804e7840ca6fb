"""Trackers: a run's parameters, metrics and files in MLflow, copied from the run folder off the training's critical path.

metrics.jsonl is the truth. A tracker is sent every record once, skips what its server already has (after a crash), and
posts from a thread of its own. A tracking fault never stops training: the user is told once. MLflow is imported on use.
"""

import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hjepa.errors import UserError

log = logging.getLogger(__name__)
BATCH = 500  # metrics per request; MLflow allows 1000


class NoTracking:
    """Keeps everything in the run folder only; also the interface of a tracker."""

    def start(
        self, folder: Path, experiment: str, run_id: str | None, params: dict[str, Any], tags: dict[str, str]
    ) -> str | None:
        """Start or, with a `run_id`, resume the tracked run of a run folder; returns its id."""
        return None

    def log(self, record: dict[str, Any]) -> None:
        """Send a record {"step": int, name: number, ...}."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Send a file."""

    def finish(self, status: str) -> None:
        """End the run as "FINISHED", "FAILED" or "KILLED" after everything was sent."""

    def add(self, run_id: str, tags: dict[str, str], files: list[Path], folder: str) -> None:
        """Give tags and files to a run that has ended."""

    def how_to_look(self) -> str | None:
        """The command that shows the run, or None."""
        return None


class MLflow(NoTracking):
    """MLflow on a database, by default `mlflow.db` in the output root, or the server that MLFLOW_TRACKING_URI names.

    Args:
        uri: tracking URI, or None for MLFLOW_TRACKING_URI or the database.
        output_root: where the database and the artifacts go.
        system_metrics: record CPU, memory and GPU use.
    """

    def __init__(self, uri: str | None, output_root: str, system_metrics: bool) -> None:
        root = Path(output_root).expanduser().absolute()
        self.root = root
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
        self.system_metrics = system_metrics
        self.broken = False
        self.run_id = ""  # empty: no run
        self.experiment_id = ""
        self.sent: set[tuple[str, int]] = set()
        self.pending: list[Any] = []
        self.posts: list[Future[None]] = []
        self.thread = ThreadPoolExecutor(max_workers=1)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the usual 7 hold a run up for minutes
        try:
            import mlflow
        except ImportError:
            raise UserError("tracking=mlflow needs the package mlflow; pip install mlflow, or use tracking=none.") from None
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.mlflow = mlflow
        self.client: Any = None  # its constructor already creates the database

    def attempt(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        """Call; after the first fault warn once and call no more."""
        if self.broken:
            return None
        try:
            return call(*args)
        except Exception as error:  # whatever a tracker does, training goes on
            self.broken = True
            log.warning("MLflow at %s: %s failed (%s); the run goes on, metrics.jsonl keeps everything", self.uri, what, error)
            return None

    def start(
        self, folder: Path, experiment: str, run_id: str | None, params: dict[str, Any], tags: dict[str, str]
    ) -> str | None:
        return self.attempt("starting a run", self.open, folder, experiment, run_id, params, tags) or run_id

    def open(self, folder: Path, experiment: str, run_id: str | None, params: dict[str, Any], tags: dict[str, str]) -> str:
        """Find or create experiment and run; learn what the server already has."""
        before = os.environ.get("MLFLOW_TRACKING_URI")
        self.mlflow.set_tracking_uri(self.uri)
        if before is None:  # MLflow writes it to the environment, where the next job of a sweep would find it
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".mlflow.lock").open("w") as lock:  # two first users of a fresh database would break it
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.client = self.mlflow.MlflowClient(self.uri)
            self.experiment_id = self.find_experiment(experiment)
        tags = tags | {"run_folder": str(folder)}
        known = run_id or self.find_run(tags)
        self.mlflow.end_run()  # of an earlier job in this process
        run = self.mlflow.start_run(
            run_id=known,
            experiment_id=self.experiment_id,
            run_name=folder.name,
            tags=tags,
            log_system_metrics=self.system_metrics,
        )
        self.run_id = str(run.info.run_id)
        if known:
            self.learn_sent(run.data.metrics)
        if not run.data.params:
            self.log_params(params)
        return self.run_id

    def find_experiment(self, name: str) -> str:
        """The id of the experiment, created if it is not there."""
        found = self.client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        local = str(self.root / "mlartifacts") if self.uri.startswith("sqlite") else None
        return str(self.client.create_experiment(name, artifact_location=local))

    def find_run(self, tags: dict[str, str]) -> str | None:
        """A run of this folder and config that still counts as running: a crash may have come before its id was kept."""
        same = " and ".join(f"tags.{key} = '{tags[key]}'" for key in ("run_folder", "config") if key in tags)
        runs = self.client.search_runs([self.experiment_id], f"{same} and attributes.status = 'RUNNING'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def learn_sent(self, latest: dict[str, float]) -> None:
        """Remember every (metric, step) that the server has, so that nothing is sent twice."""
        for key in latest:
            self.sent |= {(key, metric.step) for metric in self.client.get_metric_history(self.run_id, key)}

    def log_params(self, params: dict[str, Any]) -> None:
        """Log the flattened config, 100 to a request as MLflow allows."""
        entities = [self.mlflow.entities.Param(k, str(v)[:6000]) for k, v in params.items()]
        for i in range(0, len(entities), 100):
            self.client.log_batch(self.run_id, params=entities[i : i + 100])

    def log(self, record: dict[str, Any]) -> None:
        now, step = int(time.time() * 1000), record["step"]
        for key, value in record.items():
            if key != "step" and (key, step) not in self.sent:
                self.sent.add((key, step))
                self.pending.append(self.mlflow.entities.Metric(key, value, now, step))
        if len(self.pending) >= BATCH or not any(not post.done() for post in self.posts[-1:]):
            self.flush()

    def flush(self) -> None:
        """Hand what is pending to the posting thread."""
        if self.pending and self.run_id:
            batch, self.pending = self.pending, []
            for i in range(0, len(batch), BATCH):
                part = batch[i : i + BATCH]
                self.posts.append(self.thread.submit(self.attempt, "sending metrics", self.post, part))

    def post(self, metrics: list[Any]) -> None:
        """Send metrics, from the posting thread."""
        self.client.log_batch(self.run_id, metrics=metrics)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        if self.run_id:
            self.attempt(f"sending {path.name}", self.client.log_artifact, self.run_id, str(path), folder)

    def finish(self, status: str) -> None:
        self.flush()
        self.thread.shutdown(wait=True)
        if self.run_id:
            self.attempt("ending the run", self.mlflow.end_run, status)

    def add(self, run_id: str, tags: dict[str, str], files: list[Path], folder: str) -> None:
        self.attempt("adding to an ended run", self.add_to, run_id, tags, files, folder)

    def add_to(self, run_id: str, tags: dict[str, str], files: list[Path], folder: str) -> None:
        """Set tags and send files, whatever the run's state."""
        client = self.mlflow.MlflowClient(self.uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        for file in files:
            client.log_artifact(run_id, str(file), folder)

    def how_to_look(self) -> str | None:
        if not self.uri.startswith("sqlite"):
            return f"the address {self.uri} into a browser"
        return (
            f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {sys.executable} -m mlflow server --backend-store-uri {self.uri} "
            f"--host 127.0.0.1 --port 5000 --workers 1\n  and open "
            f"http://127.0.0.1:5000/#/experiments/{self.experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
        )
