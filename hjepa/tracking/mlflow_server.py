"""Where MLflow keeps runs: its address, its database file, and how experiments are found in it."""

import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from hjepa.config.errors import UserError
from hjepa.config.passwords import HIDDEN, hide_passwords

FILE = "sqlite:///"  # begins the address of a database file

PORT = 5000  # of the server that is suggested to view a database


def tracking_uri(uri: str | None, root: Path) -> str:
    """Return the address: the given one, or MLFLOW_TRACKING_URI, or the database file in the output root.

    A config that a run has saved does not contain the password of its address, which MLFLOW_TRACKING_URI then supplies.
    """
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and HIDDEN in uri and variable and hide_passwords(variable) == uri:
        return variable
    return uri or variable or f"{FILE}{database_path(root)}"


def database_path(root: Path | str) -> Path:
    """Return the database file of an output root."""
    return Path(root).expanduser().absolute() / "mlflow.db"


def view_command(uri: str, experiment_id: str) -> str:
    """Return what to type to view an experiment, quoted for the shell."""
    page = f"#/experiments/{experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    if uri.startswith("http"):
        parts = urlsplit(uri)
        address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        return f"the address {address.rstrip('/')}/{page} into a browser"
    store = shlex.quote(uri) if hide_passwords(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.quote(sys.executable)} -m mlflow server --backend-store-uri {store} "
        f"--host 127.0.0.1 --port {PORT} --workers 1\n  and open http://127.0.0.1:{PORT}/{page}"
    )


def database_file(uri: str) -> Path | None:
    """Return the database file that an address names; None for a server."""
    return Path(uri.removeprefix(FILE)) if uri.startswith(FILE) else None


@contextlib.contextmanager
def database_lock(uri: str) -> Iterator[None]:
    """Lock a database file, because two processes that create it at the same time corrupt it; servers need no lock.

    A file that does not exist yet is created under another name, since a process that is killed meanwhile leaves it unusable.
    """
    file = database_file(uri)
    if not file:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            create_database(file)
        yield


def create_database(file: Path) -> None:
    """Create a database file, completely or not at all."""
    from mlflow import MlflowClient

    temporary = file.with_name(f".{file.name}.tmp")
    for leftover in file.parent.glob(f"{temporary.name}*"):  # with its journal
        leftover.unlink()
    MlflowClient(f"{FILE}{temporary}").search_experiments(max_results=1)
    temporary.replace(file)


def find_experiment(client: Any, uri: str, name: str, root: Path) -> str:
    """Return the id of an experiment, which is created if it does not exist.

    Raises:
        UserError: The experiment was deleted, which keeps its name taken.
    """
    from mlflow import MlflowException

    experiment = client.get_experiment_by_name(name)
    if not experiment:
        location = str(root / "mlartifacts") if uri.startswith("sqlite") else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another run may have created it on the server in the meantime
            experiment = client.get_experiment_by_name(name)
            if not experiment:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {name} was deleted there; restore it (mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}), or choose another name (experiment_name=NAME, or task.experiment=NAME with task=sync)"
        )
    return str(experiment.experiment_id)
