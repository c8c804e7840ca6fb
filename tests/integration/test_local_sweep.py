"""The local launcher: limited slots, order of the jobs, isolation of failures, and graceful stops."""

import json
import os
import re
import signal
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
from hjepa.sweeps.local import gpu_shares
from tests.helpers.runs import ROOT, TINY, launch

TWO_SLOTS = f"hardware.slots={min(2, num_cores())}"
LONG = [o for o in TINY if not o.startswith("train.epochs")] + ["train.epochs=2000"]


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
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


def job_process(launcher: int, log: str) -> psutil.Process:
    """Return the process of a job, found by its open log file."""
    children = psutil.Process(launcher).children(recursive=True)
    return next(child for child in children if any(file.path.endswith(log) for file in child.open_files()))


def test_failed_jobs_do_not_stop_others_and_only_unfinished_jobs_run_again(tmp_path: Path) -> None:
    with sweep(tmp_path, *LONG, TWO_SLOTS, "train.epochs=2000,2", "train.batch_size=24,100000") as process:
        wait_until(lambda: any("2000" in (f / "config.yaml").read_text() for f in runs_with_steps(tmp_path)))
        job_process(process.pid, "/0.log").kill()
        out = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    (file,) = tmp_path.glob("sweeps/*/sweep.json")
    jobs = json.loads(file.read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["FAILED", "finished", "FAILED", "FAILED"]
    assert jobs[0]["reason"] == "killed by SIGKILL"
    assert jobs[2]["reason"].startswith("train.batch_size=100000: expected")
    assert jobs[1]["results"]["linear"] == json.loads((Path(jobs[1]["folder"]) / "summary.json").read_text())["probe"]["linear"]
    table = file.with_name("table.txt").read_text()
    assert table in out
    assert "killed by SIGKILL" in table
    assert "0.log" in table
    assert "3 of 4 jobs did not finish (number 0, 2, 3)" in out
    assert "Traceback" not in out
    order = [int(number) for number in re.findall(r"job (\d) started", out)]
    assert order == [0, 1, 2, 3]
    again = launch("--multirun", f"output_root={tmp_path}", *LONG, TWO_SLOTS, "train.epochs=2", "train.batch_size=24,100000")
    assert again.returncode == 1
    assert "job 0 was finished before" in again.stdout
    assert re.findall(r"job (\d) started", again.stdout) == ["1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_saves_all_running_jobs(tmp_path: Path, number: signal.Signals) -> None:
    count = min(2, num_cores())
    with sweep(tmp_path, *LONG, TWO_SLOTS, "seed=0,1,2") as process:
        wait_until(lambda: len(runs_with_steps(tmp_path)) == count)
        os.killpg(process.pid, number)  # as a terminal or a scheduler does
        out = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert statuses(tmp_path) == ["stopped"] * count
    (file,) = tmp_path.glob("sweeps/*/sweep.json")
    assert [job["state"] for job in json.loads(file.read_text())["jobs"]] == ["stopped"] * count + ["pending"] * (3 - count)
    assert "The same command continues the sweep" in out
    assert all((f / "checkpoints" / "latest.pt").exists() for f in runs_with_steps(tmp_path))


def test_jobs_save_and_end_if_their_launcher_is_killed(tmp_path: Path) -> None:
    with sweep(tmp_path, *LONG, "seed=0,1") as process:
        wait_until(lambda: runs_with_steps(tmp_path))
        process.kill()
        wait_until(lambda: statuses(tmp_path) == ["stopped"])


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


def test_too_many_slots_on_the_command_line(tmp_path: Path) -> None:
    result = launch("--multirun", *TINY, f"output_root={tmp_path}", "hardware.slots=1000", "seed=0,1")
    assert result.returncode == 1
    assert "hardware.slots=1000" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("default/*"))
