"""MLflow databases that tests use but do not test: MLflow's creation of one takes as long as a tiny run."""

import tempfile
from functools import cache
from pathlib import Path


@cache
def empty_database() -> bytes:
    """Return the contents of a database that MLflow has created."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def prepare_database(output_root: Path) -> None:
    """Put an empty database where the runs under an output root look for theirs."""
    output_root.mkdir(parents=True, exist_ok=True)
    (output_root / "mlflow.db").write_bytes(empty_database())
