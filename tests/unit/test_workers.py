"""Workers that die, block or have no shared memory: each ends as promised, and nothing hangs."""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.data import workers as workers_module
from hjepa.data.image_files import CorruptFiles, ImageFiles
from hjepa.data.sources import FilePaths
from hjepa.data.stream import Stream
from hjepa.data.workers import Interrupted, Workers
from tests.helpers.children import begin, run_config
from tests.helpers.results import metrics, wait_for_records
from tests.helpers.runs import tiny
from tests.unit.test_data import make_folder
from tests.unit.test_stream import options

SKIPPED = 77  # exit status of a child that may not mount


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write 24 JPEGs of three classes."""
    return make_folder(tmp_path / "images", size=(40, 24))


@pytest.fixture
def stream(root: Path) -> Iterator[Stream]:
    """Stream the images through three workers, in batches of two."""
    stream = stream_of(root)
    yield stream
    stream.close()


def stream_of(root: Path, num_workers: int = 3) -> Stream:
    """Stream the images of a folder in batches of two, again and again."""
    paths = np.array([os.fsencode(path) for path in sorted(root.rglob("*.jpg"))])
    labels = torch.zeros(len(paths), dtype=torch.int64)
    files = ImageFiles(FilePaths(paths), labels, 16, CorruptFiles(len(paths), 0.0), num_workers)
    return Stream(files, lambda step: torch.arange(2 * step, 2 * step + 2) % len(paths), 2, 1000, torch.device("cpu"))


def mount_small_shared_memory() -> None:
    """Give this process a /dev/shm of one page; exit with `SKIPPED` if that is not permitted."""
    new_user, new_mounts = 0x10000000, 0x00020000
    user, libc = os.getuid(), ctypes.CDLL(None)
    if libc.unshare(new_mounts | (new_user if user else 0)):
        os._exit(SKIPPED)
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    commands = (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=4k", "none", "/dev/shm"])
    if any(subprocess.run(command, check=False).returncode for command in commands):
        os._exit(SKIPPED)


def compare_in_small_shared_memory(root: Path) -> None:
    """Exit with 0 if the batches are right."""
    mount_small_shared_memory()
    stream, memory = stream_of(root), stream_of(root, 0)
    os._exit(0 if all(torch.equal(stream.batch(step), memory.batch(step)) for step in range(20)) else 1)


def test_workers_need_no_shared_memory_of_the_system(root: Path) -> None:
    child = begin(compare_in_small_shared_memory, root)
    child.join(300)
    if child.exitcode == SKIPPED:
        pytest.skip("mount namespaces are not permitted: the test with a small /dev/shm did not run")
    assert child.exitcode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_dies_is_explained_in_one_sentence(stream: Stream, number: signal.Signals) -> None:
    stream.batch(0)
    os.kill(multiprocessing.active_children()[0].pid, number)
    with pytest.raises(UserError, match=rf"decodes images died \(killed by {number.name}\).*dataset.workers.*continues a run"):
        list(map(stream.batch, range(1, 20)))


def test_a_worker_that_ends_by_itself_has_said_why(stream: Stream) -> None:
    process = SimpleNamespace(join=lambda seconds: None, exitcode=1)
    message = str(Workers.death(SimpleNamespace(processes=[process], files=stream.files), 0))
    assert "(exit code 1); its output above says why" in message
    assert "memory" not in message


def test_a_worker_that_is_stopped_ends_the_run(stream: Stream, monkeypatch) -> None:
    monkeypatch.setattr(workers_module, "BLOCKED_SECONDS", 2)
    stream.batch(0)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"has been blocked for 2 seconds while it read .*\.jpg; .*continues a run"):
        list(map(stream.batch, range(1, 20)))
    stream.close()
    assert not multiprocessing.active_children()


def test_a_file_that_cannot_be_read_to_its_end_is_named(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers_module, "BLOCKED_SECONDS", 2)
    (root / "class0" / "3.jpg").unlink()
    os.mkfifo(root / "class0" / "3.jpg")
    stream = stream_of(root)
    with pytest.raises(UserError, match=r"blocked for 2 seconds while it read .*class0/3\.jpg"):
        list(map(stream.batch, range(4)))
    stream.close()


def test_a_slow_worker_is_waited_for(root: Path, monkeypatch) -> None:
    """A process that uses the processor is at work, however long a batch takes."""
    monkeypatch.setattr(workers_module, "BLOCKED_SECONDS", 1)
    stream, decode = stream_of(root, 1), ImageFiles.decode

    def slow(*args: object) -> object:
        end = time.process_time() + 1.5
        while time.process_time() < end:
            pass
        return decode(*args)

    monkeypatch.setattr(ImageFiles, "decode", slow)
    assert stream.batch(0).shape == (2, 3, 16, 16)
    stream.close()


def test_nobody_waits_for_images_after_a_stop_signal(stream: Stream, monkeypatch) -> None:
    monkeypatch.setattr(workers_module, "STOP_SECONDS", 1)
    stream.batch(0, stop=True)  # images that arrive are used
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(Interrupted):
        list(map(partial(stream.batch, stop=True), range(1, 20)))


def report_workers(root: Path, file: Path) -> None:
    """Write the ids of the workers to a file and wait to be killed."""
    stream = stream_of(root)
    stream.batch(0)
    file.with_suffix(".tmp").write_text(json.dumps([process.pid for process in multiprocessing.active_children()]))
    file.with_suffix(".tmp").rename(file)
    signal.pause()


def test_workers_end_with_the_process_that_started_them(root: Path, tmp_path: Path) -> None:
    child = begin(report_workers, root, tmp_path / "pids")
    while child.is_alive() and not (tmp_path / "pids").exists():
        child.join(0.01)
    workers = [psutil.Process(pid) for pid in json.loads((tmp_path / "pids").read_text())]
    assert len(workers) == 3
    child.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_whose_workers_are_blocked(root: Path, tmp_path: Path, number: signal.Signals) -> None:
    long = ("train.epochs=30", "train.log_every=1", "probe=none", "name=r", f"output_root={tmp_path}")
    overrides = [option for option in tiny(*options(root, 2, 0.0, *long)) if not option.startswith("probe.")]
    child = begin(run_config, overrides, tmp_path / "said")
    wait_for_records(tmp_path / "default" / "r", 5, child.is_alive)
    workers = psutil.Process(child.pid).children()
    for worker in workers:
        worker.suspend()
    os.kill(child.pid, number)
    began = time.monotonic()
    child.join(300)
    assert child.exitcode == 130, (tmp_path / "said").read_text()
    assert time.monotonic() - began < 30
    summary = json.loads((tmp_path / "default" / "r" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    state = torch.load(tmp_path / "default" / "r" / "checkpoints" / "latest.pt", weights_only=True)
    assert state["step"] == max(record["step"] for record in metrics(tmp_path / "default" / "r")), "no step is lost"
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.thorough
def test_workers_that_are_not_forked_return_the_same_batches(root: Path, monkeypatch) -> None:
    """As on macOS."""
    stream, memory = stream_of(root, 1), stream_of(root, 0)
    monkeypatch.setattr(workers_module, "START_METHOD", "spawn")
    assert all(torch.equal(stream.batch(step), memory.batch(step)) for step in range(3))
    stream.close()
