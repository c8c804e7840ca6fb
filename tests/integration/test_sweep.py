"""Sweeps: jobs equal single runs, and table, plots and tracked runs can be made and compared at any time."""

import itertools
import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.run import prepare, run
from hjepa.distributed.resources import num_cores
from hjepa.sweeps import slurm
from hjepa.sweeps.job import Job
from hjepa.sweeps.plan import plan_jobs
from hjepa.sweeps.sweep import Sweep
from tests.helpers.children import launch
from tests.helpers.database import prepare_database
from tests.helpers.runs import ROOT, TINY, compose, tiny

SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "search")
SWEEPS_OF_VITS = ("masking", "speed_by_model")
FILES = ("table.txt", "sweep.png", "progress.png")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["model"]


@pytest.mark.thorough
def test_jobs_of_a_sweep_are_bitwise_equal_to_single_runs_and_are_tracked(tmp_path: Path) -> None:
    options = [option for option in TINY if not option.startswith("levels=")]
    options += ["tracking=mlflow", "experiment_name=e", "model.encoder.drop_path=0.2"]
    small = ["hydra.sweeper.params.levels='flat,pyramid'", "hydra.sweeper.params.seed='1'"]
    sweep_options = ["+sweeps=levels", *small, f"hardware.slots={min(2, num_cores())}"]
    for name in ("sweep", "alone"):
        prepare_database(tmp_path / name)
    swept = launch(*sweep_options, *options, f"output_root={tmp_path}/sweep")
    assert swept.returncode == 0, swept.stderr
    folders = sorted((tmp_path / "sweep" / "e").iterdir())
    assert len(folders) == 2
    last = next(f for f in folders if "pyramid" in f.name and "-s1-" in f.name)
    run(compose(*options, f"output_root={tmp_path}/alone", "levels=pyramid", "seed=1"))
    a, b = weights(last), weights(tmp_path / "alone" / "e" / last.name)
    assert all(torch.equal(a[k], b[k]) for k in a)

    import mlflow

    (sweep,) = (tmp_path / "sweep" / "sweeps").iterdir()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/sweep/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id], f"tags.sweep = '{sweep.name}'")
    assert sorted(r.data.tags["run_folder"] for r in runs) == [str(f) for f in folders]
    assert {r.info.run_name[:8] for r in runs} == {"s1 flat ", "s1 pyram"}, "told apart at a glance"
    for r in runs:
        assert r.info.status == "FINISHED"
        assert "mlflow.parentRunId" not in r.data.tags
        assert len(client.get_metric_history(r.info.run_id, "train/loss")) == 9, "no metrics of another job"
        assert r.data.params["seed"] == r.info.run_name.split("-s")[-1][0]
        assert {a.path for a in client.list_artifacts(r.info.run_id, "sweep")} == {f"sweep/{name}" for name in FILES}
    check_files_can_be_made_again(sweep)


def check_files_can_be_made_again(sweep: Path) -> None:
    """Check that `task=sweep` makes the table and the plots from sweep.json and the run folders."""
    before = (sweep / "table.txt").read_text()
    assert before.count("finished") == 2
    assert all(levels in before for levels in ("flat", "pyramid"))
    for name in FILES:
        (sweep / name).unlink()
    run(compose("task=sweep", f"task.folder={sweep}"))
    assert (sweep / "table.txt").read_text() == before
    assert all((sweep / name).stat().st_size > 5000 for name in ("sweep.png", "progress.png"))
    run(compose("task=sweep", f"task.folder={sweep}", "task.metric=steps"))
    assert "steps" in (sweep / "table.txt").read_text()
    with pytest.raises(UserError, match=r"task\.metric=probe\.knnn: none of the runs has it; expected one of .*probe\.knn,"):
        run(compose("task=sweep", f"task.folder={sweep}", "task.metric=probe.knnn"))


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no sweep folder: it has no sweep\.json"):
        run(compose("task=sweep", f"task.folder={tmp_path}"))


@pytest.mark.thorough
def test_duplicate_jobs_are_refused_and_a_mistyped_option_starts_nothing(tmp_path: Path) -> None:
    same = launch("--multirun", *TINY, f"output_root={tmp_path}", "train.epochs=1", "hardware.threads=1,2", "seed=0")
    assert same.returncode == 1
    assert "This is the run of job 0 again" in same.stdout
    assert "1 of 2 jobs did not finish (number 1)" in same.stderr
    typo = launch("--multirun", *tiny("levels=flat,piramid"), f"output_root={tmp_path}/typo")
    assert typo.returncode == 1
    assert "levels=piramid is not an option" in typo.stderr
    assert "Traceback" not in typo.stderr
    assert not list((tmp_path / "typo").glob("default/*"))


def job(number: int, folder: Path, status: str = "finished", linear: float = 0.5, **options: str) -> Job:
    """Return a job with a summary in its run folder."""
    path = folder / "runs" / str(number)
    path.mkdir(parents=True)
    summary = {"status": status, "reason": None, "probe": {"linear": linear}, "untrained": {"linear": 0.1}, "run_id": None}
    (path / "summary.json").write_text(json.dumps(summary))
    return Job(number, [f"{key}={value}" for key, value in options.items()], path, folder / f"{number}.log")


def test_jobs_of_a_task_without_a_run_of_its_own_have_no_run_folder() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", ["task=evaluate"], RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        jobs = plan_jobs(loader, config, [["task=evaluate", "run=A"], ["task=evaluate", "run=B"]])
    assert [(job.state, job.reason, job.folder) for job in jobs] == [("pending", "", None)] * 2
    assert jobs[0].path.is_absolute()


def test_a_change_of_the_states_after_they_were_loaded_is_noticed(tmp_path: Path) -> None:
    sweep, jobs = Sweep(tmp_path), [job(0, tmp_path)]
    sweep.save(jobs)
    sweep.load()
    assert not sweep.has_changed()
    os.utime(sweep.file, (0, 0))
    assert sweep.has_changed()


def test_a_log_is_named_itself_where_links_are_not_supported(tmp_path: Path, monkeypatch) -> None:
    def symlink_to(link: Path, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    assert Sweep(tmp_path).link_log(0, tmp_path / "submitit" / "5_0.out") == tmp_path / "submitit" / "5_0.out"


def test_a_failed_job_stays_failed_until_its_run_is_continued(tmp_path: Path) -> None:
    sweep, failed = Sweep(tmp_path), job(0, tmp_path, seed="0")
    failed.state = "FAILED"
    sweep.save([failed])
    os.utime(tmp_path / "runs" / "0" / "summary.json", (0, 0))
    sweep.refresh([failed])
    assert failed.state == "FAILED", "the summary is older than the failure"
    os.utime(tmp_path / "sweep.json", (0, 0))
    os.utime(tmp_path / "runs" / "0" / "summary.json", (1, 1))
    sweep.refresh([failed])
    assert failed.state == "finished"
    assert sweep.load()[0].folder == failed.folder


def test_the_files_of_a_sweep_contain_no_password(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text("tracking: {mlflow: {uri: 'http://user:secret@host'}}\nseed: 0\n")
    Sweep(tmp_path).save([job(0, tmp_path, **{"tracking.mlflow.uri": "http://user:secret@host"})])
    Sweep(tmp_path).hide_passwords()
    assert "secret" not in (tmp_path / "sweep.json").read_text()
    assert (tmp_path / "multirun.yaml").read_text() == "tracking: {mlflow: {uri: 'http://user:***@host'}}\nseed: 0\n"
    assert Sweep(tmp_path).load()[0].overrides == ["tracking.mlflow.uri=http://user:***@host"]


@pytest.mark.parametrize("refused", ["levels=flat,piramid", "hydra.launcher.timeout_min=0"])
def test_a_refused_sweep_leaves_no_password_that_others_can_read(tmp_path: Path, refused: str) -> None:
    result = launch("--multirun", refused, "tracking.mlflow.uri=http://user:secret@host", f"output_root={tmp_path}")
    assert result.returncode == 1
    (config,) = tmp_path.rglob("multirun.yaml")
    assert "uri: http://user:" in config.read_text()
    readable = [file for file in tmp_path.rglob("*") if file.is_file() and stat.S_IMODE(file.stat().st_mode) != 0o600]
    assert not [file for file in readable if b"secret" in file.read_bytes()]


def test_the_table_shows_which_jobs_wait_or_run_again(run, tmp_path: Path, monkeypatch, capsys) -> None:
    jobs = [job(number, tmp_path, "stopped", seed=str(number)) for number in range(2)]
    for number, stopped in enumerate(jobs):
        stopped.slurm_id = f"7_{number}"
    Sweep(tmp_path).save(jobs)
    monkeypatch.setattr(slurm, "accounting_states", lambda ids: {})
    monkeypatch.setattr(slurm, "queue_states", lambda users: {"7_0": "RUNNING", "7_1": "PENDING"})
    run("task=sweep", f"task.folder={tmp_path}")
    assert [job.state for job in Sweep(tmp_path).load()] == ["running", "pending"]
    assert "stopped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("hydra.sweeper.storage=mysql://user:secret@host/db", "hydra.sweeper.storage=mysql://user:***@host/db: Optuna 2.10"),
        ("probe=none", "probe=none: a search maximizes the accuracy of the linear probe, which needs labels"),
    ],
)
def test_a_search_that_cannot_work_is_refused(option: str, message: str, tmp_path: Path) -> None:
    result = launch("--multirun", "hydra/sweeper=optuna", "seed=choice(0,1)", option, f"output_root={tmp_path}")
    assert result.returncode == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_trials_without_a_result_have_failed(tmp_path: Path) -> None:
    good, bad = job(0, tmp_path, linear=0.7), job(1, tmp_path)
    good.update_from_summary(json.loads((good.folder / "summary.json").read_text()))
    bad.state, bad.reason = "FAILED", "The loss is not finite."
    first, second = Sweep(tmp_path).trial_returns([good, bad])
    assert (first.status, first.return_value) == (JobStatus.COMPLETED, 0.7)
    assert second.status == JobStatus.FAILED
    with pytest.raises(UserError, match=r"^job 1 FAILED: The loss is not finite\.$"):
        _ = second.return_value


@pytest.mark.thorough
def test_a_search_maximizes_the_result_and_the_same_command_with_more_trials_continues_it(tmp_path: Path) -> None:
    options = [*TINY, "train.epochs=1", "experiment_name=e", f"output_root={tmp_path}", f"hydra.sweep.dir={tmp_path}/search"]
    search = ["--multirun", "hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-2))", *options]
    first = launch(*search, "hydra.sweeper.n_trials=1")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "search" / "table.txt").read_text() in first.stdout
    again = launch(*search, "hydra.sweeper.n_trials=2")
    assert again.returncode == 0, again.stderr
    assert "job 0 was finished before" in again.stdout
    assert re.findall(r"job (\d) running", again.stdout) == ["1"]
    jobs = json.loads((tmp_path / "search" / "sweep.json").read_text())["jobs"]
    assert [job["number"] for job in jobs] == [0, 1]
    best = OmegaConf.load(tmp_path / "search" / "optimization_results.yaml")
    assert best.best_value == max(job["results"]["linear"] for job in jobs if job["state"] == "finished")


@pytest.mark.thorough
@pytest.mark.parametrize("name", SWEEPS)
def test_prepared_sweep(name: str, tmp_path: Path) -> None:
    small = ["dataset.train=160", "dataset.test=10", "hardware=cpu", "hardware.threads=1", "tracking=none"]
    small += [f"output_root={tmp_path}", f"+sweeps={name}", "debug=small_vit" if name in SWEEPS_OF_VITS else "debug=small"]
    compose(*small)
    choices = {key: str(value).split(",") for key, value in HydraConfig.get().sweeper.params.items()}
    jobs = [
        [f"{key}={value}" for key, value in zip(choices, chosen, strict=True)] for chosen in itertools.product(*choices.values())
    ]
    assert len({prepare(compose(*small, *overrides))[1] for overrides in jobs}) == len(jobs), "no two jobs are the same run"
    one = compose(*small, *jobs[0], *(["task.steps=2"] if name.startswith("speed") else []))
    run(one)
    _, folder = prepare(one)
    assert json.loads((folder / "summary.json").read_text())["status"] in ("finished", "collapsed")
