"""Several processes train the same weights as one, and start, stop and fail together. Real processes, gloo."""

import contextlib
import json
import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from hjepa.config.errors import UserError
from hjepa.distributed.launch import launch as start_task
from hjepa.distributed.launch import start as start_processes
from hjepa.distributed.launch import was_started_by_srun
from hjepa.distributed.process_group import World
from hjepa.distributed.slurm import adopt_slurm
from hjepa.tracking.run_folder import RunFolder
from tests.helpers.children import begin, launch, run_command, start
from tests.helpers.runs import ROOT, TINY, VIEWS, trainer

STEPS = 3
COMMON = ("schedule.lr.warmup_epochs=0", "optimizer.eps=1e-3", "train.clip_norm=0.5", "dataset.augment.jitter=0.5")
CONFIGS = {
    "default": (),
    "accumulated": ("train.accumulate=3", "levels=depth", "regularizer.levels=[0,0.5]", "projector=mlp"),
    "views": (
        "model.encoder.stem=conv",
        "dataset.views=2",
        "dataset.local_views=2",
        "regularizer=sigreg",
        "projector=mlp",
        "masking=block",
    ),
    "regularizer only": ("levels=none", "masking=none", "regularizer=infonce", "teacher=none", "dataset.views=2"),
    "other views": (
        *VIEWS,
        *("dataset.views=2", "dataset.local_views=2", "levels.predictor=[matching,attention]"),
    ),
    "batch norms": (
        *("model=conv_nano", "model.encoder.stem=8", "model.encoder.dims=[8,8,16]", *VIEWS),
        *("dataset.views=2", "dataset.local_views=2", "hardware.activation_checkpointing=true"),
    ),
    "batch norms of timm": ("model=timm", "model.encoder.name=test_byobnet", "levels=flat", "dataset.image_size=64"),
    "sharded heads": ("model=conv_nano", *VIEWS, "dataset.views=2", "levels.matching.depth=1"),
    "stacked": ("levels=stacked", "dataset.image_size=32", "levels.upper.detach=false", "masking=multiblock", "loss=infonce"),
    "sharded": ("train.accumulate=2", "projector=mlp", "hardware.activation_checkpointing=true"),
    "sharded views": ("dataset.views=2", "dataset.local_views=2", "regularizer=sigreg", "levels=stacked", "teacher=refresh"),
    "plain": ("levels=flat", "regularizer=none", "hardware.activation_checkpointing=true", "train.batch_size=48"),
}


def train_all(divided: bool) -> dict[str, Any]:
    """Return weights and mean terms after three steps of every config; the last step is that of a resumed trainer."""
    results = {}
    for name, overrides in CONFIGS.items():
        options = [*COMMON, *overrides, f"hardware.shard={divided and name.startswith('sharded')}"]
        t = trainer(*options)
        for step in range(STEPS):
            if step == STEPS - 1:
                state, t = t.world.broadcast_object(t.state_dict()), trainer(*options)
                t.load_state_dict(state)
            t.meter.add(t.train_step(t.get_batch(step), step))
        weights = t.state_dict()["model"]
        results[name] = ({k: v.detach().clone() for k, v in weights.items()}, t.meter.interval_means())
    return results


def rank(number: int, count: int, port: int, file: Path) -> None:
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in names.items()}
    results = train_all(divided=True)
    if number == 0:
        torch.save(results, file)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results of one process, and those of two."""
    file = tmp_path_factory.mktemp("ranks") / "results.pt"
    port = get_free_port()
    processes = [begin(rank, number, 2, port, file) for number in range(2)]
    alone = train_all(divided=False)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    return alone, torch.load(file)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_with_half_the_batch_each_train_the_weights_of_one(name: str, results: Any) -> None:
    (weights, terms), (divided_weights, divided_terms) = (result[name] for result in results)
    assert weights.keys() == divided_weights.keys()
    for key, weight in weights.items():
        # AdamW turns the rounding error of a tiny gradient into a visible part of its step, which is 2e-3 at most.
        torch.testing.assert_close(divided_weights[key], weight, atol=3e-4, rtol=1e-4)
    assert terms.keys() == divided_terms.keys()
    for key, term in terms.items():
        assert divided_terms[key] == pytest.approx(term, rel=1e-3, abs=1e-5), key


def test_the_processes_share_each_accumulated_part_of_a_batch() -> None:
    rows = [World(rank, 4).rows(48, 3) for rank in range(4)]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(48))
    for part in range(3):
        assert all(set((share[4 * part : 4 * part + 4] // 16).tolist()) == {part} for share in rows)


STEP = {
    **{"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "8"},
    **{"SLURM_STEP_NODELIST": "localhost,other", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_PORT": "1234"},
}
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_tasks_of_srun_are_processes_of_the_run_unless_a_local_sweep_started_the_job(monkeypatch) -> None:
    for name in (*TORCHRUN, "SUBMITIT_EXECUTOR"):
        monkeypatch.setenv(name, "")  # which restores it after the test
        monkeypatch.delenv(name)
    assert not was_started_by_srun()
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert was_started_by_srun()
    adopt_slurm()
    assert [os.environ[name] for name in TORCHRUN] == ["3", "1", "4", "2", "localhost", "1234"]
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert not was_started_by_srun()
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert not was_started_by_srun(), "in a batch script"


@pytest.mark.parametrize(("processes", "is_accepted"), [(4, True), (None, True), (2, False)])
def test_srun_must_start_as_many_tasks_as_the_config_says(monkeypatch, processes: int | None, is_accepted: bool) -> None:
    for name in (*TORCHRUN, "SUBMITIT_EXECUTOR"):
        monkeypatch.setenv(name, "")  # which restores it after the test
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # each task may see the GPU that is its own
    started: list[Path] = []

    def task(config: Any, path: Path) -> None:
        started.append(path)

    refusal = pytest.raises(UserError, match="processes=2, but srun has started 4 tasks")
    with contextlib.nullcontext() if is_accepted else refusal:
        start_task(task, {"hardware": {"processes": processes, "device": "cuda"}}, Path("run"))
    assert bool(started) == is_accepted


@pytest.mark.parametrize(
    ("gpus", "device", "processes", "refusal"),
    [
        (1, "cuda", 2, "the number of GPUs is 1; set hardware.processes=1, or choose hardware=cpu"),
        (3, "auto", 4, "the number of GPUs is 3; set hardware.processes=3, or choose hardware=cpu"),
        (2, "cuda", 2, None),
        (1, "cpu", 2, None),
        (0, "auto", 2, None),
        (2, "cuda", None, None),
    ],
)
def test_every_process_needs_a_gpu_of_its_own(monkeypatch, gpus: int, device: str, processes: int, refusal: str | None) -> None:
    for name in (*TORCHRUN, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # which restores it after the test
        monkeypatch.delenv(name)
    counts: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("hjepa.distributed.launch.start", lambda task, config, path, count: counts.append(count))
    config = {"hardware": {"processes": processes, "device": device}}
    with pytest.raises(UserError, match=f"processes={processes}: .*{refusal}") if refusal else contextlib.nullcontext():
        start_task(refuse, config, Path("run"))
    assert counts == ([] if refusal else [2])


def refuse(config: Any, path: Path) -> None:
    raise UserError("refused before the folder is claimed")


def test_processes_that_never_claimed_a_folder_do_not_change_its_summary(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {})
    folder.claim(overwrite=False)
    folder.write_summary({"status": "finished"})
    folder.release()
    with pytest.raises(UserError, match="refused"):
        start_processes(refuse, {}, tmp_path, 2)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "finished"}


# -- the command line --------------------------------------------------------------------------------------------------

OPTIONS = [o for o in TINY if not o.startswith(("dataset.train", "train.epochs"))] + [
    *("dataset.train=400", "train.epochs=2", "optimizer.eps=1e-3", "hardware.processes=2"),
]


def start_two(root: Path) -> ForkServerProcess:
    """Start the run in the background; its errors go to a file."""
    return start(*OPTIONS, f"output_root={root}", "name=r", output=root / "output", errors=root / "errors")


def run_as_a_process_group(root: Path) -> None:
    """Run launch.py as the leader of a process group, as a shell starts a command."""
    os.setpgrp()
    command = [*OPTIONS, f"output_root={root}", "name=r"]
    run_command(command, root / "output", root / "errors", ROOT, {**os.environ, "OMP_NUM_THREADS": "1"})


def ranks_of(pid: int) -> list[psutil.Process]:
    """Return the processes that a launching process has started."""
    return [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until the run has recorded a step."""
    end = time.monotonic() + 200
    file = folder / "metrics.jsonl"
    while not (file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines())):
        assert time.monotonic() < end, "the run makes no progress"
        time.sleep(0.05)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uninterrupted")
    done = launch(*OPTIONS, f"output_root={root}", "name=r")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2:") == 1, "only the main process prints"
    assert done.stdout.count("Run folder:") == 1
    return root / "default" / "r"


@pytest.mark.thorough
def test_a_stopped_run_continues_to_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "default" / "r"
    process = start_two(tmp_path)
    wait_for_step(folder, 10)
    os.kill(process.pid, signal.SIGTERM)
    process.join(100)
    assert process.exitcode == 130
    assert (tmp_path / "errors").read_text().count("Stopped (stopped by signal 15") == 1
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    again = launch(*OPTIONS, f"output_root={tmp_path}", "name=r")
    assert again.returncode == 0, again.stderr
    a, b = weights(uninterrupted), weights(folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps, expected = (
        [json.loads(line)["step"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, uninterrupted)
    )
    assert steps == expected


@pytest.mark.thorough
def test_an_interrupt_while_the_processes_start_is_one_line(tmp_path: Path) -> None:
    process = begin(run_as_a_process_group, tmp_path)
    end = time.monotonic() + 200
    while len(ranks_of(process.pid)) < 2:
        assert time.monotonic() < end, "the processes do not start"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # to the whole process group, as a terminal does
    process.join(100)
    assert (tmp_path / "errors").read_text() == "Interrupted; no file is left half-written.\n"
    assert process.exitcode == 130
    assert not (tmp_path / "default" / "r").exists()


@pytest.mark.thorough
def test_a_dead_process_ends_the_run_which_another_number_of_processes_continues(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "default" / "r"
    process = start_two(tmp_path)
    wait_for_step(folder, 10)
    ranks = ranks_of(process.pid)
    max(ranks, key=lambda r: r.create_time()).kill()
    process.join(60)
    assert process.exitcode == 1
    assert "of 2 died" in (tmp_path / "errors").read_text()
    assert not any(r.is_running() for r in ranks)
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    alone = launch(*OPTIONS, f"output_root={tmp_path}", "name=r", "hardware.processes=1")
    assert alone.returncode == 0, alone.stderr
    assert "the run started with 2 processes and continues with 1" in alone.stdout
    a, b = weights(uninterrupted), weights(folder)
    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=1e-3, rtol=1e-2)
