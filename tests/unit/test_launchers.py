"""The launchers accept the options of hydra-submitit-launcher, and leave those of other programs alone."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, LocalQueueConf, SlurmQueueConf
from omegaconf import OmegaConf
from submitit.core.utils import cloudpickle_dump

from hjepa.config.errors import UserError
from hjepa.config.schema import resolve
from hjepa.distributed.resources import quota
from hjepa.sweeps import launcher, slurm
from hjepa.sweeps.job import Job
from hjepa.sweeps.launcher import check_numbers, import_this_copy, launch, may_go_on
from hjepa.sweeps.local import LocalQueue, update_from_processes
from hjepa.sweeps.queue import private_pickles
from hjepa.sweeps.slurm import parse_states, refusal, update_from_slurm
from hjepa.sweeps.submission import Submission
from hjepa.sweeps.sweep import Sweep
from hjepa.tracking.provenance import SUBMITTED_VARIABLE
from hjepa.tracking.run_folder import try_lock
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


def test_a_full_disk_ends_a_sweep_with_one_sentence(tmp_path: Path, monkeypatch) -> None:
    def check(options: dict) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launcher, "check_numbers", check)
    with pytest.raises(UserError, match="No space left on device"):
        launch(None, "local", {}, None, OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}), [], 0)


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
    monkeypatch.setattr(slurm, "queue_states", lambda users: answers.pop(0))
    jobs = [Job(number, [], None, slurm_id=str(number)) for number in range(1, 6)]
    update_from_slurm(jobs)
    assert [job.state for job in jobs] == ["running", "pending", "finished", "FAILED", "FAILED"]
    assert [job.reason for job in jobs[3:]] == ["ended by SLURM as UNKNOWN", "ended by SLURM as PREEMPTED"]


@pytest.mark.parametrize(
    ("summary", "slurm_state", "expected"),
    [
        ("stopped", "PENDING", "pending"),
        ("FAILED", "RUNNING", "running"),
        ("requeued", "RUNNING", "running"),
        ("finished", "PENDING", "pending"),  # it was submitted again, to be made longer
        ("finished", "RUNNING", "finished"),  # it is about to end
        ("stopped", "CANCELLED", "stopped"),
        ("collapsed", "COMPLETED", "collapsed"),
        ("stopped", "", "stopped"),
    ],
)
def test_a_job_that_waits_or_runs_again_is_not_what_its_summary_says(
    monkeypatch, summary: str, slurm_state: str, expected: str
) -> None:
    monkeypatch.setattr(slurm, "accounting_states", lambda ids: {})
    monkeypatch.setattr(slurm, "queue_states", lambda users: {"1": slurm_state} if slurm_state else None)
    job = Job(0, [], Path("/nowhere"), state=summary, reason="of the last session", slurm_id="1")
    update_from_slurm([job])
    assert (job.state, bool(job.reason)) == (expected, expected == summary)


def test_the_reason_of_a_failure_without_a_result_contains_the_end_of_the_log(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(slurm, "CONFIRMATION_SECONDS", 0)
    monkeypatch.setattr(slurm, "queue_states", lambda users: dict.fromkeys("012", "FAILED"))
    logs = [tmp_path / name for name in ("killed", "empty", "missing")]
    end = "10%\rsrun: error: vm: task 0: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=1.0\n"
    logs[0].write_text("step 3\n" * 2000 + end + "srun: Force Terminated StepId=1.0\n\n")
    logs[1].touch()
    jobs = [Job(number, [], None, log=log, slurm_id=str(number)) for number, log in enumerate(logs)]
    update_from_slurm(jobs)
    ended = "ended by SLURM as FAILED"
    assert [job.reason for job in jobs] == [f"{ended}; its log ends with: srun: error: vm: task 0: Killed", ended, ended]


def test_the_jobs_of_the_user_who_submitted_them_are_listed(tmp_path: Path, monkeypatch) -> None:
    commands = []
    monkeypatch.setattr(slurm, "run_command", lambda *command: commands.append(command) or "1|RUNNING\n")
    log = tmp_path / "0.log"
    log.symlink_to("submitit/1_0_log.out")
    update_from_slurm([job := Job(0, [], None, log=log, slurm_id="1")])
    assert job.state == "running"
    assert f"--user={os.getuid()}" in next(command for command in commands if command[0] == "squeue")


def test_a_cluster_that_does_not_answer_changes_no_state(monkeypatch) -> None:
    monkeypatch.setattr(slurm, "run_command", lambda *command: None)
    job = Job(0, [], None, slurm_id="1")
    update_from_slurm([job])
    assert job.state == "pending"


def test_the_result_of_a_job_without_a_run_is_known_after_slurm_has_forgotten_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(slurm, "CONFIRMATION_SECONDS", 0)
    monkeypatch.setattr(slurm, "accounting_states", lambda ids: {})
    monkeypatch.setattr(slurm, "queue_states", lambda users: {})
    jobs = []
    for number, outcome in enumerate([("success", None), ("error", "Traceback\nhjepa.config.errors.UserError: no run\n")]):
        cloudpickle_dump(outcome, tmp_path / f"5_{number}_0_result.pkl")
        jobs.append(Job(number, [], None, log=tmp_path / f"5_{number}_0_log.out", slurm_id=f"5_{number}"))
    update_from_slurm(jobs)
    assert [(job.state, job.reason) for job in jobs] == [("finished", ""), ("FAILED", "no run")]


def test_jobs_on_this_machine_that_nobody_follows_end(tmp_path: Path) -> None:
    """One job works, one holds the lock of its run, and of the others one was killed, one has failed and one has finished."""
    submitit = tmp_path / "submitit"
    submitit.mkdir()
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", str(submitit)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        pids = [process.pid, *(2**22 + number for number in range(1, 5))]  # the others are larger than any process id
        jobs = [
            Job(number, [], tmp_path if number == 1 else None, log=submitit / f"{pid}_0_log.out", state="running")
            for number, pid in enumerate(pids)
        ]
        cloudpickle_dump(("error", "Traceback\nValueError: no"), submitit / f"{pids[3]}_0_result.pkl")
        cloudpickle_dump(("success", 0.5), submitit / f"{pids[4]}_0_result.pkl")
        (tmp_path / ".lock").touch()
        with try_lock(tmp_path):
            update_from_processes(jobs)
        assert [job.state for job in jobs] == ["running", "running", "FAILED", "FAILED", "finished"]
        process.communicate()
    update_from_processes(jobs)
    assert [job.state for job in jobs] == ["FAILED", "FAILED", "FAILED", "FAILED", "finished"]
    assert [job.reason.partition(",")[0] for job in jobs] == [*["its process was killed"] * 3, "ValueError: no", ""]


def test_a_job_that_was_given_no_gpus_sees_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    options = {"cpus_per_task": None, "mem_gb": None, "nodes": 1, "tasks_per_node": 1, "wait": True}
    for number, visible in ((None, "4,5"), (1, "4"), (0, "")):
        queue = LocalQueue(Sweep(tmp_path), [], None, None, 0.1, options=options | {"gpus_per_node": number})
        assert queue.free_slots == [visible]


# -- passwords in the configs of jobs -----------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_refused_submission_leaves_no_config_that_others_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "submitit"
    folder.mkdir(mode=0o755)

    def submit() -> None:
        with private_pickles(folder):
            (folder / "config.pkl").touch(mode=0o644)
            assert mode(folder) == 0o700
            raise UserError("SLURM refused the jobs.")

    with pytest.raises(UserError):
        submit()
    assert (mode(folder), mode(folder / "config.pkl")) == (0o755, 0o600)


@pytest.fixture
def submission(tmp_path: Path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Return a function that performs a submission whose task is another function."""
    monkeypatch.setattr("hjepa.sweeps.submission.configure_log", lambda *options: None)
    monkeypatch.setenv(SUBMITTED_VARIABLE, "")
    handler = signal.getsignal(signal.SIGUSR2)

    def perform(task: Callable[..., None], *overrides: str) -> None:
        monkeypatch.setattr("hjepa.sweeps.submission.perform", task)
        config = resolve(compose(*overrides))
        Submission(config, tmp_path, OmegaConf.create({"hydra": HydraConfig.get()}), {}).run()

    yield perform
    signal.signal(signal.SIGUSR2, handler)


def test_a_job_of_any_task_that_is_requeued_writes_its_config_for_its_owner(submission, tmp_path: Path) -> None:
    signal.signal(signal.SIGUSR2, lambda number, frame: (tmp_path / "config.pkl").touch())  # as submitit does
    submission(lambda config, folder: os.kill(os.getpid(), signal.SIGUSR2), "task=evaluate")
    assert mode(tmp_path / "config.pkl") == 0o600


@pytest.mark.parametrize(
    ("overrides", "is_blocked"),
    [(["tracking=none"], True), (["tracking=wandb"], False), (["task=evaluate", "tracking=mlflow"], False)],
)
def test_only_jobs_that_make_runs_without_wandb_do_without_it(submission, monkeypatch, overrides, is_blocked: bool) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    del sys.modules["wandb"]
    seen = []
    submission(lambda config, folder: seen.append("wandb" in sys.modules), *overrides)
    assert seen == [is_blocked]


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [("7_[1-2,5%2]", "1 2 5"), ("7_[3]", "3"), ("7_[0-20:10]", "0 10 20"), ("7_[0-11,20...%4]", "0 1 2 3 4 5 6 7 8 9 10 11 20")],
)
def test_tasks_that_sacct_lists_together_have_states_of_their_own(tasks: str, expected: str) -> None:
    states = parse_states(f"{tasks}|CANCELLED by 0\n")
    assert {job: state for job, state in states.items() if job != tasks} == {f"7_{i}": "CANCELLED" for i in expected.split()}


def test_a_task_that_sacct_lists_twice_has_the_state_of_its_own_line() -> None:
    for lines in ("7_1|RUNNING\n7_[1-2]|PENDING\n", "7_[1-2]|PENDING\n7_1|RUNNING\n"):
        states = parse_states(lines)
        assert (states["7_1"], states["7_2"]) == ("RUNNING", "PENDING")


def test_a_refusal_by_slurm_is_one_sentence() -> None:
    message = "sbatch: error: {}\nsbatch: error: Batch job submission failed: {}"
    options = {"partition": "nowhere", "account": None, "qos": "long"}
    names = ("invalid partition specified: nowhere", "Invalid partition name specified")
    assert refusal(message.format(*names), options) == (
        "SLURM refused the jobs: invalid partition specified: nowhere; Invalid partition name specified; change "
        "hydra.launcher.partition=nowhere to one that `sinfo -s` lists."
    )
    account = refusal("sbatch: error: Invalid account or account/partition combination specified", options)
    assert "; change hydra.launcher.account=null to one that `sacctmgr " in account
    limits = ("QOSMaxSubmitJobPerUserLimit", "Job violates accounting/QOS policy")
    assert refusal(message.format(*limits), options) == f"SLURM refused the jobs: {'; '.join(limits)}."


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
