"""The SLURM launcher on a cluster with accounting: accounts and qos, and jobs whose states only sacct knows."""

import getpass
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.helpers.accounting import run_accounting
from tests.helpers.children import launch
from tests.helpers.cluster import job_fields, poll, require_commands, run_cluster, slurm
from tests.helpers.database import prepare_database
from tests.integration.test_slurm import LONG, ON_HOLD, SUBMIT, jobs_of, queued, rows, start, summary, suspend_in_the_middle

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("accounting")]

PAID = ("hydra.launcher.account=vision", "hydra.launcher.qos=long")


@pytest.fixture(scope="module")
def accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a cluster with accounting."""
    commands = ("slurmctld", "slurmd", "slurmdbd", "mariadbd")
    require_commands("SLURM with accounting", commands, "slurmctld slurmd slurmdbd mariadb-server-core")
    folder = tmp_path_factory.mktemp("accounting")
    with run_accounting(folder) as options, run_cluster(tmp_path_factory.mktemp("slurm"), options):
        yield


@pytest.fixture
def forgetful(tmp_path: Path) -> tuple[str, Path]:
    """Return a PATH with a squeue that knows no jobs, as a while after their end, once a file exists; and that file."""
    forget, script = tmp_path / "forget", tmp_path / "bin" / "squeue"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\n[ -e {forget} ] || exec {shutil.which("squeue")} "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}{os.pathsep}{os.environ['PATH']}", forget


def accounted(job: str, *fields: str) -> list[list[str]]:
    """Return fields of a job, or of the tasks of an array, from the accounting database."""
    return [line.split("|") for line in slurm("sacct", "-n", "-X", "-P", "-o", ",".join(fields), "-j", job).splitlines()]


def runs_in_mlflow(root: Path) -> dict[str, str]:
    """Return the states of all runs by run folder."""
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {run.data.tags["run_folder"]: run.info.status for run in runs}


def test_a_sweep_has_its_account_and_qos_and_as_many_jobs_at_a_time_as_it_may(tmp_path: Path) -> None:
    options = ("tracking=none", f"output_root={tmp_path}", "hydra.launcher.array_parallelism=1")
    result = launch("--multirun", *SUBMIT, *PAID, *options, "seed=0,1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sacct does not answer" not in result.stdout + result.stderr
    array = jobs_of(tmp_path)[0]["slurm_id"].split("_")[0]
    poll(lambda: accounted(array, "State") == [["COMPLETED"]] * 2, 30, "end of both jobs in sacct")
    assert accounted(array, "JobID", "Account", "QOS") == [[f"{array}_{index}", "vision", "long"] for index in range(2)]
    (_, end), (begin, _) = sorted(accounted(array, "Start", "End"))
    assert end <= begin, "one at a time"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("hydra.launcher.qos=nowhere", "Invalid qos specification"),
        ("hydra.launcher.account=nobody", "Invalid account or account/partition combination specified"),
    ],
)
def test_an_account_or_qos_that_does_not_exist_is_reported_in_one_sentence(tmp_path: Path, override: str, reason: str) -> None:
    prepare_database(tmp_path)
    before = queued()
    result = launch("--multirun", *SUBMIT, override, "tracking=mlflow", f"output_root={tmp_path}", "seed=0,1")
    assert result.returncode == 1
    command = f"sacctmgr -P show associations user={getpass.getuser()} format=account,partition,qos"
    assert result.stderr == f"SLURM refused the jobs: {reason}; change {override} to one that `{command}` lists.\n"
    assert "vision||long,normal" in slurm(*command.split()).splitlines()
    assert queued() <= before
    assert not (tmp_path / "e").exists()
    assert not runs_in_mlflow(tmp_path)


def test_cancelled_jobs_that_only_sacct_knows_are_stopped(
    tmp_path: Path, forgetful: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancel a job that runs, one that waits to be continued, and two that were never started."""
    prepare_database(tmp_path)
    path, forget = forgetful
    with monkeypatch.context() as patch:
        patch.setenv("PATH", path)
        options = ("tracking=mlflow", f"output_root={tmp_path}", "hydra.launcher.array_parallelism=2")
        process = start("--multirun", *SUBMIT, *PAID, *LONG, *options, "seed=0,1,2,3")
    poll(lambda: jobs_of(tmp_path), 120, "submission")
    jobs = jobs_of(tmp_path)
    running, requeued = jobs[:2]
    array = running["slurm_id"].split("_")[0]
    suspend_in_the_middle(Path(running["folder"]), running["slurm_id"])
    pid = suspend_in_the_middle(Path(requeued["folder"]), requeued["slurm_id"])
    slurm("scontrol", "update", "partitionname=lab", "state=down")  # which starts no jobs
    try:
        for number in (signal.SIGUSR2, signal.SIGCONT):
            os.kill(pid, number)  # scancel would wait for the end of a task of an array
        poll(lambda: job_fields(requeued["slurm_id"])["JobState"] == "PENDING", 60, "back in the queue")
        assert list(runs_in_mlflow(tmp_path).values()).count("SCHEDULED") == 1
        poll(lambda: [f"{array}_[2-3%2]", "PENDING"] in accounted(array, "JobID", "State"), 30, "waiting jobs in sacct")
        forget.touch()
        slurm("scancel", array)
        output, _ = process.communicate(timeout=240)
    finally:
        slurm("scontrol", "update", "partitionname=lab", "state=up")
    assert process.returncode == 1, output
    table = rows(output)
    assert all("ended by SLURM as CANCELLED" in table[str(job["number"])] for job in jobs), output
    assert [summary(Path(job["folder"]))["status"] for job in (running, requeued)] == ["stopped", "stopped"]
    assert runs_in_mlflow(tmp_path) == {job["folder"]: "KILLED" for job in (running, requeued)}


def test_jobs_that_nobody_follows_get_their_states_from_sacct(tmp_path: Path, forgetful: tuple[str, Path]) -> None:
    path, forget = forgetful
    options = ("tracking=none", f"output_root={tmp_path}", "hydra.launcher.wait=false")
    assert launch("--multirun", *SUBMIT, *PAID, *options, ON_HOLD, "seed=0,1,2").returncode == 0
    array = jobs_of(tmp_path)[0]["slurm_id"].split("_")[0]
    (file,) = tmp_path.glob("sweeps/*/sweep.json")

    def states() -> list[str]:
        result = launch("task=sweep", f"task.folder={file.parent}", PATH=path)
        assert result.returncode == 0, result.stderr
        return [f"{job['state']} {job['reason']}".strip() for job in json.loads(file.read_text())["jobs"]]

    assert states() == ["pending"] * 3
    slurm("scancel", array)
    end = [[f"{array}_[0-2%3]", f"CANCELLED by {os.getuid()}"]]
    poll(lambda: accounted(array, "JobID", "State") == end, 30, "end of the jobs in sacct")
    forget.touch()
    assert states() == ["FAILED ended by SLURM as CANCELLED"] * 3
