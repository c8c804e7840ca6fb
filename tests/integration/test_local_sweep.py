"""The local launcher: limited slots, order of the jobs, isolation of failures, and graceful stops."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hjepa.config.errors import UserError
from hjepa.distributed.resources import num_cores
from hjepa.sweeps.job import Job
from hjepa.sweeps.local import check_options, gpu_shares
from tests.helpers.children import launch
from tests.helpers.runs import ROOT, TINY

TWO_SLOTS = f"hardware.slots={min(2, num_cores())}"
LONG = [o for o in TINY if not o.startswith("train.epochs")] + ["train.epochs=2000"]


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait for a condition, and fail after a deadline."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the deadline passed"
        time.sleep(0.1)


@contextmanager
def sweep(folder: Path, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a sweep in the background."""
    command = [sys.executable, str(ROOT / "launch.py"), "--multirun", f"output_root={folder}", *overrides]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def runs_with_steps(folder: Path) -> list[Path]:
    """Return the folders of runs that have taken training steps."""
    return [file.parent for file in folder.glob("default/*/metrics.jsonl") if len(file.read_text().splitlines()) > 2]


def statuses(folder: Path) -> list[str]:
    """Return how the runs ended."""
    return [json.loads(file.read_text())["status"] for file in folder.glob("default/*/summary.json")]


def job_processes(folder: Path) -> list[psutil.Process]:
    """Return all processes of the jobs of a sweep: those that compute, and submitit's processes that watch them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(word.startswith(f"{folder}/sweeps/") for word in command) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def computing(folder: Path) -> list[psutil.Process]:
    """Return the processes of a sweep that compute."""
    return [process for process in job_processes(folder) if "submitit.core._submit" in process.cmdline()]


def test_a_killed_or_failed_job_stops_no_other_and_only_unfinished_jobs_run_again(tmp_path: Path) -> None:
    with sweep(tmp_path, *LONG, TWO_SLOTS, "train.epochs=2000,2") as process:
        wait_until(lambda: any("2000" in (f / "config.yaml").read_text() for f in runs_with_steps(tmp_path)))
        log = next(tmp_path.glob("sweeps/*/0.log")).resolve()
        next(p for p in computing(tmp_path) if any(file.path == str(log) for file in p.open_files())).kill()
        out = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    (file,) = tmp_path.glob("sweeps/*/sweep.json")
    jobs = json.loads(file.read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["FAILED", "finished"]
    assert jobs[0]["reason"].startswith("its process was killed")
    assert jobs[1]["results"]["linear"] == json.loads((Path(jobs[1]["folder"]) / "summary.json").read_text())["probe"]["linear"]
    table = file.with_name("table.txt").read_text()
    assert table in out
    assert "its process was killed" in table
    assert "0.log" in table
    assert "run folder" in file.with_name("0.log").read_text()
    assert "1 of 2 jobs did not finish (number 0)" in out
    assert "Traceback" not in out
    assert re.findall(r"job (\d) running", out) == ["0", "1"]
    again = launch("--multirun", f"output_root={tmp_path}", *LONG, TWO_SLOTS, "train.epochs=2", "train.batch_size=24,100000")
    assert again.returncode == 1
    assert "job 0 was finished before" in again.stdout
    assert re.findall(r"job (\d) running", again.stdout) == ["1"]
    assert re.search(r"job 1 FAILED after \d+ s \(2 of 2\): train\.batch_size=100000: expected", again.stdout)


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "slots"), [(signal.SIGINT, min(2, num_cores())), (signal.SIGTERM, 1)])
def test_an_interrupted_sweep_saves_all_running_jobs(tmp_path: Path, number: signal.Signals, slots: int) -> None:
    with sweep(tmp_path, *LONG, f"hardware.slots={slots}", "seed=0,1,2") as process:
        wait_until(lambda: len(runs_with_steps(tmp_path)) == slots)
        os.killpg(process.pid, number)  # as a terminal or a scheduler does
        out = process.communicate(timeout=300)[0]
    assert process.returncode == 130
    assert statuses(tmp_path) == ["stopped"] * slots
    (file,) = tmp_path.glob("sweeps/*/sweep.json")
    assert [job["state"] for job in json.loads(file.read_text())["jobs"]] == ["stopped"] * slots + ["pending"] * (3 - slots)
    assert "The same command continues the sweep" in out
    assert all((f / "checkpoints" / "latest.pt").exists() for f in runs_with_steps(tmp_path))
    assert not job_processes(tmp_path)


def test_jobs_save_and_end_if_their_launcher_is_killed(tmp_path: Path) -> None:
    with sweep(tmp_path, *LONG, "seed=0,1") as process:
        wait_until(lambda: runs_with_steps(tmp_path))
        process.kill()
        wait_until(lambda: statuses(tmp_path) == ["stopped"])
        wait_until(lambda: not job_processes(tmp_path))
    (log,) = tmp_path.glob("sweeps/*/0.log")
    assert "the launching command was killed" in log.read_text()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in log.resolve().parent.glob("*_submitted.pkl")}
    assert modes == {0o600}, "configs of jobs contain passwords"


@pytest.mark.thorough
def test_jobs_that_need_no_slot_of_another_go_on_without_the_command(tmp_path: Path) -> None:
    result = launch("--multirun", f"output_root={tmp_path}", *TINY, "train.epochs=1", "seed=0", "hydra.launcher.wait=false")
    assert result.returncode == 0, result.stderr
    (controller,) = re.findall(r"To cancel them all: kill (\d+)", result.stdout)
    assert int(controller) in [process.pid for process in job_processes(tmp_path)]
    wait_until(lambda: statuses(tmp_path) == ["finished"])


@pytest.mark.parametrize(
    ("hardware", "visible", "message"),
    [
        ({"slots": 0}, "", "hardware.slots=0"),
        ({"slots": num_cores() + 1}, "", f"{num_cores()} cores of this machine"),
        ({"slots": 2, "threads": num_cores()}, "", f"hardware.slots=2 with {num_cores()} threads each"),
        ({"slots": 2, "device": "cuda"}, "3", "every slot needs a GPU of its own, and this machine has 1"),
        ({"slots": 2, "device": "auto"}, "3", "every slot needs a GPU of its own, and this machine has 1"),
    ],
)
def test_more_slots_than_the_machine_supports_are_refused(monkeypatch, hardware: dict, visible: str, message: str) -> None:
    if hardware["slots"] == 2 and "device" in hardware and num_cores() < 2:
        pytest.skip("one core")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=message):
        gpu_shares([{"hardware": {"threads": None, "processes": 1, "device": "cpu"} | hardware}])


@pytest.mark.skipif(num_cores() < 2, reason="one core")
def test_gpus_are_distributed_over_the_slots(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    config = {"hardware": {"threads": None, "processes": 1, "device": "cuda", "slots": 2}}
    assert gpu_shares([config]) == [["4", "5"], ["6", "7"]]
    assert gpu_shares([{"hardware": config["hardware"] | {"slots": 1}}]) == [["4", "5", "6", "7"]]


@pytest.mark.skipif(num_cores() < 2, reason="one core")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_task": 2}, "hydra.launcher.cpus_per_task is not limited on this machine"),
        ({"tasks_per_node": 2}, "set hardware.processes"),
        ({"wait": False}, r"wait=false: 3 jobs, but hardware\.slots=2, and none would start the others; set hardware\.slots=3"),
    ],
)
def test_options_that_make_no_sense_on_one_machine_are_refused(options: dict, message: str) -> None:
    given = {"cpus_per_task": None, "mem_gb": None, "nodes": 1, "tasks_per_node": 1, "wait": True} | options
    config = {"hardware": {"threads": None, "processes": 1, "device": "cpu", "slots": 2}}
    with pytest.raises(UserError, match=message):
        check_options(given, [Job(number, [], None, config=config) for number in range(3)])


@pytest.mark.skipif(num_cores() < 2, reason="one core")
def test_the_number_of_gpus_of_a_job_can_be_set(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    config = {"hardware": {"threads": None, "processes": 1, "device": "cuda", "slots": 2}}
    assert gpu_shares([config], 1) == [["4"], ["5"]]
    with pytest.raises(UserError, match=r"hydra\.launcher\.gpus_per_node=3 with hardware\.slots=2: this machine has 5 GPUs"):
        gpu_shares([config], 3)


def test_too_many_slots_on_the_command_line(tmp_path: Path) -> None:
    result = launch("--multirun", *TINY, f"output_root={tmp_path}", "hardware.slots=1000", "seed=0,1")
    assert result.returncode == 1
    assert "hardware.slots=1000" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("default/*"))
