"""Runs that are interrupted, and what they leave: weights, metrics without times, and their copies in MLflow."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

LONG = (
    "train.epochs=4",
    "train.log_every=3",
    "probe.every=2",
    "checkpoint.every_seconds=0.01",
    "model.encoder.drop_path=0.1",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["model"]


def metrics(folder: Path) -> list[dict]:
    timing = ("images_per_second", "seconds", "peak_memory_mb")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in timing} for r in records]


def wait_for_records(folder: Path, count: int, is_alive: Callable[[], bool]) -> None:
    """Wait until the run has written `count` records, or has ended."""
    file = folder / "metrics.jsonl"
    while is_alive() and not (file.exists() and len(file.read_text().splitlines()) >= count):
        time.sleep(0.005)  # polls a file and makes no assumption about speed


def check_mlflow(root: Path, names: Sequence[str]) -> None:
    """Check that there is one finished run for each name, with each metric of metrics.jsonl once per step."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(names)
    for run in runs:
        assert run.info.status == "FINISHED"
        records = [json.loads(line) for line in (root / "e" / run.info.run_name / "metrics.jsonl").read_text().splitlines()]
        for key in {k for r in records for k in r} - {"step"}:
            tracked = sorted(m.step for m in client.get_metric_history(run.info.run_id, key))
            assert tracked == [r["step"] for r in records if key in r], key
        assert run.data.params["model.patch_size"] == "4"
        files = {f.path for folder in (None, "plots") for f in client.list_artifacts(run.info.run_id, folder)}
        assert {"config.yaml", "summary.json", "plots/curves.png", "plots/masks.png"} <= files
