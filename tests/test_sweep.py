"""A sweep's jobs are the same runs as alone; a failing one stops nothing and is seen."""

import json
from pathlib import Path

import torch

from tests.conftest import TINY, launch


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["model"]


def test_jobs_of_a_sweep_equal_the_same_jobs_alone_bit_for_bit(tmp_path: Path) -> None:
    options = [*TINY, "tracking=mlflow", "experiment_name=e", "model.encoder.drop_path=0.2"]
    sweep = launch("--multirun", *options, f"output_root={tmp_path}/sweep", "levels=flat,pyramid", "seed=0,1")
    assert sweep.returncode == 0, sweep.stderr
    folders = sorted((tmp_path / "sweep" / "e").iterdir())
    assert len(folders) == 4
    table = sweep.stdout[sweep.stdout.rindex("Sweep:") :]
    assert all(f"levels={levels} seed={seed}" in table for levels in ("flat", "pyramid") for seed in (0, 1))
    assert table.count("finished") == 4
    last = next(f for f in folders if "pyramid" in f.name and "-s1-" in f.name)
    alone = launch(*options, f"output_root={tmp_path}/alone", "levels=pyramid", "seed=1")
    assert alone.returncode == 0, alone.stderr
    a, b = state(last), state(tmp_path / "alone" / "e" / last.name)
    assert all(torch.equal(a[k], b[k]) for k in a)

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/sweep/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert sorted(r.info.run_name for r in runs) == [f.name for f in folders]
    for r in runs:
        assert r.info.status == "FINISHED"
        assert len(client.get_metric_history(r.info.run_id, "train/loss")) == 9, "no metric of another job"
        assert r.data.params["seed"] == r.info.run_name.split("-s")[-1][0]


def test_a_failing_job_stops_no_other_and_fails_the_sweep(tmp_path: Path) -> None:
    sweep = launch("--multirun", *TINY, f"output_root={tmp_path}", "levels=flat", "train.batch_size=100000,24", "seed=0")
    assert sweep.returncode == 1
    table = sweep.stdout[sweep.stdout.rindex("Sweep:") :]
    assert table.count("FAILED") == 1
    assert "train.batch_size=100000: expected" in table
    assert table.count("finished") == 1
    again = launch("--multirun", *TINY, f"output_root={tmp_path}", "levels=flat", "train.batch_size=24", "seed=0")
    assert again.returncode == 0
    assert "This run is finished" in again.stdout, "a sweep started again does only what is missing"


def test_ready_sweep_over_levels(tmp_path: Path) -> None:
    shorter = [o for o in TINY if not o.startswith("train.epochs")] + [
        "train.epochs=1",
        "hydra.sweeper.params.seed='0'",
    ]
    sweep = launch("+sweeps=levels", *shorter, f"output_root={tmp_path}", "experiment_name=e")
    assert sweep.returncode == 0, sweep.stderr
    names = [p.name for p in (tmp_path / "e").iterdir()]
    assert all(any(f"-{levels}-" in name for name in names) for levels in ("flat", "pyramid", "depth", "summary"))
    for folder in (tmp_path / "e").iterdir():
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
