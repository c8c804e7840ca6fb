"""Jobs in slots of this machine: bounded, in order, alone with their faults, and stopped politely."""

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

SLOTS = f"hardware.slots={min(2, num_cores())}"
LONG = [o for o in TINY if not o.startswith("train.epochs")] + ["train.epochs=2000"]


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for a condition, with a deadline."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the deadline passed"
        time.sleep(0.1)


@contextmanager
def sweep(folder: Path, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    """A sweep in the background."""
    command = [sys.executable, str(ROOT / "launch.py"), "--multirun", f"output_root={folder}", *overrides]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def trained(folder: Path) -> list[Path]:
    """The run folders that have taken steps."""
    return [file.parent for file in folder.glob("default/*/metrics.jsonl") if len(file.read_text().splitlines()) > 2]


def statuses(folder: Path) -> list[str]:
    """How the runs ended."""
    return [json.loads(file.read_text())["status"] for file in folder.glob("default/*/summary.json")]


def job_process(launcher: int, log: str) -> psutil.Process:
    """The process of a job, by its open log file."""
    found = [p for p in psutil.Process(launcher).children(recursive=True) if any(f.path.endswith(log) for f in p.open_files())]
    return found[0]


def test_a_killed_job_and_a_refused_one_stop_no_other_and_only_they_are_done_again(tmp_path: Path) -> None:
    with sweep(tmp_path, *LONG, SLOTS, "train.epochs=2000,2", "train.batch_size=24,100000") as process:
        until(lambda: any("2000" in (f / "config.yaml").read_text() for f in trained(tmp_path)))
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
    again = launch("--multirun", f"output_root={tmp_path}", *LONG, SLOTS, "train.epochs=2", "train.batch_size=24,100000")
    assert again.returncode == 1
    assert "job 0 was finished before" in again.stdout
    assert re.findall(r"job (\d) started", again.stdout) == ["1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_sweep_saves_all_running_jobs_and_says_stopped(tmp_path: Path, number: signal.Signals) -> None:
    count = min(2, num_cores())
    with sweep(tmp_path, *LONG, SLOTS, "seed=0,1,2") as process:
        until(lambda: len(trained(tmp_path)) == count)
        os.killpg(process.pid, number)  # as a terminal or a scheduler does
        out = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert statuses(tmp_path) == ["stopped"] * count
    (file,) = tmp_path.glob("sweeps/*/sweep.json")
    assert [job["state"] for job in json.loads(file.read_text())["jobs"]] == ["stopped"] * count + ["pending"] * (3 - count)
    assert "The same command continues the sweep" in out
    assert all((f / "checkpoints" / "latest.pt").exists() for f in trained(tmp_path))


def test_jobs_save_and_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    with sweep(tmp_path, *LONG, "seed=0,1") as process:
        until(lambda: trained(tmp_path))
        process.kill()
        until(lambda: statuses(tmp_path) == ["stopped"])


@pytest.mark.parametrize(
    ("hardware", "visible", "words"),
    [
        ({"slots": 0}, "", "hardware.slots=0"),
        ({"slots": num_cores() + 1}, "", f"{num_cores()} cores of this machine"),
        ({"slots": 2, "threads": num_cores()}, "", f"hardware.slots=2 with {num_cores()} threads each"),
        ({"slots": 2, "device": "cuda"}, "3", "every slot needs a GPU of its own, and there are 1"),
        ({"slots": 2, "device": "auto"}, "3", "every slot needs a GPU of its own, and there are 1"),
    ],
)
def test_more_slots_than_the_machine_has_are_refused(monkeypatch, hardware: dict, visible: str, words: str) -> None:
    if hardware["slots"] == 2 and "device" in hardware and num_cores() < 2:
        pytest.skip("one core")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError, match=words):
        gpu_shares([{"hardware": {"threads": None, "processes": 1, "device": "cpu"} | hardware}])


@pytest.mark.skipif(num_cores() < 2, reason="one core")
def test_gpus_are_dealt_out_to_the_slots(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    config = {"hardware": {"threads": None, "processes": 1, "device": "cuda", "slots": 2}}
    assert gpu_shares([config]) == [["4", "5"], ["6", "7"]]
    assert gpu_shares([{"hardware": config["hardware"] | {"slots": 1}}]) == [["4", "5", "6", "7"]]


def test_too_many_slots_as_typed(tmp_path: Path) -> None:
    result = launch("--multirun", *TINY, f"output_root={tmp_path}", "hardware.slots=1000", "seed=0,1")
    assert result.returncode == 1
    assert "hardware.slots=1000" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("default/*"))
