"""The launchers accept the options of hydra-submitit-launcher, and leave those of other programs alone."""

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, LocalQueueConf, SlurmQueueConf
from omegaconf import OmegaConf

from hjepa.config.errors import UserError
from hjepa.distributed.resources import quota
from hjepa.sweeps import launcher, slurm
from hjepa.sweeps.job import Job
from hjepa.sweeps.launcher import check_numbers, import_this_copy, launch, may_go_on
from hjepa.sweeps.local import LocalQueue
from hjepa.sweeps.slurm import update_from_slurm
from tests.helpers.runs import ROOT, compose


@pytest.mark.parametrize(
    ("override", "schema", "name"),
    [
        ("hardware=cpu", LocalQueueConf, "LocalLauncher"),
        ("hardware=slurm_gpu", SlurmQueueConf, "SlurmLauncher"),
        ("hydra/launcher=submitit_slurm", SlurmQueueConf, "SlurmLauncher"),
    ],
)
def test_launchers_are_ours_and_have_all_options_of_the_plugin(override: str, schema: type[BaseQueueConf], name: str) -> None:
    compose(override)
    launcher = HydraConfig.get().launcher
    assert launcher._target_ == f"hydra_plugins.hjepa_launchers.launchers.{name}"
    assert {option.name for option in fields(schema)} <= set(launcher)


def test_other_programs_keep_the_launchers_of_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    code = (
        f"import hydra; hydra.initialize_config_dir({str(tmp_path)!r}, version_base='1.3');"
        "print(hydra.compose('config', ['hydra/launcher=submitit_local'], return_hydra_config=True).hydra.launcher._target_)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"


@pytest.mark.parametrize(("option", "value"), [("nodes", 0), ("timeout_min", -1), ("poll_seconds", 0.0), ("gpus_per_node", -1)])
def test_numbers_that_make_no_sense_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^hydra\\.launcher\\.{option}={value}: expected a number above 0"):
        check_numbers({option: value})


def test_some_numbers_may_be_zero() -> None:
    check_numbers({"gpus_per_node": 0, "max_num_timeout": 0, "wait": False, "partition": None})


@pytest.mark.parametrize(
    ("states", "sweeper", "expected"),
    [
        (["FAILED"], {"n_jobs": 1, "n_trials": 20}, True),
        (["FAILED"] * 5, {"n_jobs": 1, "n_trials": 20}, False),
        (["FAILED"] * 5, {"n_jobs": 8, "n_trials": 20}, True),
        (["FAILED"] * 8, {"n_jobs": 8, "n_trials": 20}, False),
        (["FAILED"] * 3, {"n_jobs": 1, "n_trials": 3}, False),
        (["finished"] + ["FAILED"] * 9, {"n_jobs": 1, "n_trials": 20}, True),
    ],
)
def test_a_search_goes_on_until_several_trials_have_failed_without_a_result(states: list[str], sweeper: dict, expected) -> None:
    jobs = [Job(number, [], None, state=state) for number, state in enumerate(states)]
    assert may_go_on(jobs, OmegaConf.create(sweeper)) is expected


def test_a_full_disk_ends_a_sweep_with_one_sentence(monkeypatch) -> None:
    def check(options: dict) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launcher, "check_numbers", check)
    with pytest.raises(UserError, match="No space left on device"):
        launch(None, "local", {}, None, OmegaConf.create(), [], 0)


def test_jobs_find_this_copy_of_the_code_once(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/other")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for _ in range(2):
        import_this_copy()
        assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}/other"


def test_jobs_that_nobody_follows_get_their_states_from_slurm(monkeypatch) -> None:
    waiting = {"1": "RUNNING", "2": "NODE_FAIL", "3": "COMPLETED", "5": "PREEMPTED"}
    answers = [waiting, waiting | {"2": "PENDING"}, waiting | {"2": "PENDING"}]
    monkeypatch.setattr(slurm, "CONFIRMATION_SECONDS", 0)
    monkeypatch.setattr(slurm, "accounting_states", lambda ids: {})
    monkeypatch.setattr(slurm, "queue_states", lambda: answers.pop(0))
    jobs = [Job(number, [], None, slurm_id=str(number)) for number in range(1, 6)]
    update_from_slurm(jobs)
    assert [job.state for job in jobs] == ["running", "pending", "pending", "pending", "FAILED"]
    assert jobs[4].reason == "ended by SLURM as PREEMPTED"


def test_a_child_that_has_ended_does_not_keep_the_others_from_a_signal(monkeypatch) -> None:
    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def children(self, recursive: bool) -> list["Process"]:
            return [Process(2), Process(3)]

        def send_signal(self, number: signal.Signals) -> None:
            if self.pid == 2:
                raise psutil.NoSuchProcess(self.pid)
            signaled.append(self.pid)

    signaled: list[int] = []
    monkeypatch.setattr(psutil, "Process", Process)
    queue = SimpleNamespace(submitted={0: SimpleNamespace(job_id="1")})
    LocalQueue.send(queue, Job(0, [], None), signal.SIGKILL)
    assert signaled == [1, 3]


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("150000 100000", 2), ("10000 100000", 1)])
def test_the_quota_of_a_container_limits_the_cores(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert quota(tmp_path / "cpu.max") == cores
    assert quota(tmp_path / "missing") is None
