"""A run that is killed at any moment and started again ends as if it had never been killed: all that it leaves is compared.

HJEPA_KILLS is the number of kills, as in `HJEPA_KILLS=1000 pytest -s -m thorough tests/integration/test_kills.py`.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from hjepa.config.identity import identity
from hjepa.config.run import perform
from hjepa.config.run_path import run_path
from hjepa.tracking.run_folder import read_config, read_records, read_summary
from tests.helpers.children import begin, redirect
from tests.helpers.database import prepare_database
from tests.helpers.runs import checked_config

KILLS = int(os.environ.get("HJEPA_KILLS", 8))

INTERVALS = (60, 0.01)  # seconds between checkpoints: the default, with none but those of the epochs, and one for every step

SMALL = (  # three epochs of two steps, and measurements that cost as little as the steps
    *("train.epochs=3", "train.log_every=1", "train.accumulate=2", "dataset.train=60", "dataset.test=10"),
    *("probe.every=2", "probe.train_images=30", "probe.penalties=[0.01]", "model.encoder.drop_path=0.1", "checkpoint.last=1"),
    *("tracking=mlflow", "experiment_name=e"),
)

TIMES = ("images_per_second", "seconds", "watch_seconds", "peak_memory_mb")

NOT_COMPARED = (*TIMES, "run_id", "commit", "dirty")  # differ from run to run, or when the code is edited meanwhile


def session(config: dict[str, Any], path: Path, output: Path) -> None:
    """Start or continue a run; called in a process of its own."""
    redirect(output, 1, 2)
    perform(config, path)


def describe(folder: Path) -> dict[str, Any]:
    """Return all that a run has left and that can be compared: files, metrics, summary, config and checkpoints."""
    return {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        "records": [comparable(record) for record in read_records(folder)],
        "summary": comparable(read_summary(folder)),
        "config": identity(read_config(folder)),
    } | {file.name: comparable(torch.load(file, weights_only=True)) for file in folder.glob("checkpoints/*.pt")}


def comparable(value: Any) -> Any:
    """Return nested data without what is not compared."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [comparable(item) for item in value] if isinstance(value, list | tuple) else value


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Return the path of the first difference of nested data with tensors, or None."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if torch.equal(a, b) else path
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next((found for key in a if (found := difference(a[key], b[key], f"{path}/{key}"))), None)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next((found for i, pair in enumerate(zip(a, b, strict=True)) if (found := difference(*pair, f"{path}/{i}"))), None)
    return None if a == b or (a != a and b != b) else f"{path}: {a} != {b}"


def tracked_difference(client: Any, folder: Path) -> str | None:
    """Return how what MLflow has of a run differs from its metrics.jsonl: every point must be there once."""
    experiment = client.get_experiment_by_name("e").experiment_id
    runs = client.search_runs([experiment], f"tags.run_folder = '{folder}'")
    if [run.info.status for run in runs] != ["FINISHED"] or runs[0].info.run_id != (folder / "run_id").read_text():
        return f"MLflow has {[(run.info.run_id, run.info.status) for run in runs]}"
    records, run_id = read_records(folder), runs[0].info.run_id
    for key in {key for record in records for key in record} - {"step"}:
        points = sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
        written = [(record["step"], record[key]) for record in records if key in record]
        if key in TIMES:  # a repeated step has another time than the one that was sent first
            points, written = [point[:1] for point in points], [point[:1] for point in written]
        if found := difference([list(point) for point in points], [list(point) for point in written], f"MLflow/{key}"):
            return found
    files = {file.path for sub in (None, "plots") for file in client.list_artifacts(run_id, sub)}
    missing = {"config.yaml", "summary.json", "plots/curves.png", "plots/masks.png"} - files
    return f"MLflow lacks {sorted(missing)}" if missing else None


@contextmanager
def process_of(config: dict[str, Any], output: Path) -> Iterator[Any]:
    """Start a session, and let no process outlive the test."""
    process = begin(session, config, run_path(config), output)
    try:
        yield process
    finally:
        process.kill()
        process.join()


class Killer:
    """Kills runs at random moments.

    Args:
        longest: Seconds that a run takes. The number is adapted, since other programs slow a machine down: it grows with every
            kill and shrinks with every end, so that kills fall on all parts of a run.
    """

    def __init__(self, longest: float) -> None:
        self.longest, self.moments, self.kills = longest, random.Random(KILLS), 0

    def run(self, config: dict[str, Any], output: Path, most: int) -> None:
        """Start a run again and again until it ends by itself, and kill it at a random moment each time, `most` times at most."""
        last = min(KILLS, self.kills + most)
        while True:
            with process_of(config, output) as process:
                process.join(self.moments.uniform(0, self.longest) if self.kills < last else None)
                if process.exitcode is None:
                    process.kill()
                    process.join()
                if process.exitcode == 0:
                    self.longest /= 1.3
                    return
                assert process.exitcode == -signal.SIGKILL, output.read_text()
                self.longest *= 1.1
                self.kills += 1


@pytest.mark.thorough
def test_runs_that_are_killed_at_random_moments_end_as_if_they_were_not(tmp_path: Path) -> None:
    import mlflow

    prepare_database(tmp_path)
    client, output = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "output"
    configs = [checked_config(*SMALL, f"output_root={tmp_path}", f"checkpoint.every_seconds={s}") for s in INTERVALS]
    failures: list[str] = []
    begin(time.monotonic).join()  # the server of the processes is slow to start
    started = time.monotonic()
    with process_of(configs[0] | {"name": "undisturbed"}, output) as process:
        process.join()
        assert process.exitcode == 0, output.read_text()
    killer = Killer(longest=time.monotonic() - started)
    expected = describe(tmp_path / "e" / "undisturbed")
    for number in count():
        if killer.kills >= KILLS and number >= len(configs):
            break
        config = configs[number % len(configs)] | {"name": f"r{number}"}
        killer.run(config, output, most=max(1, min(50, KILLS // len(configs))))
        folder = run_path(config)
        found = difference(expected, describe(folder)) or tracked_difference(client, folder)
        failures += [f"{folder.name}: {found}"] if found else []
        print(f"{killer.kills} kills of {number + 1} runs, {len(failures)} runs ended wrong {failures}", flush=True)
    assert not failures
