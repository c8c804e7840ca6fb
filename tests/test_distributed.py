"""Several processes are one: the same weights as a process alone, one voice, one fate. Real processes, gloo."""

import os
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from hjepa.distributed import World
from hjepa.ranks import free_port
from tests.conftest import trainer

STEPS = 3
COMMON = ("schedule.lr.warmup_epochs=0", "optimizer.eps=1e-3", "train.clip_norm=0.5", "dataset.augment.jitter=0.5")
CONFIGS = {
    "default": (),
    "accumulated": ("train.accumulate=3", "levels=depth", "regularizer.levels=[1,0.5]", "projector=mlp"),
    "views": ("dataset.views=2", "dataset.local_views=2", "regularizer=sigreg", "projector=mlp", "masking=block"),
    "regularizer only": ("levels=none", "masking=none", "regularizer=sigreg", "teacher=none", "dataset.views=2"),
    "stacked": ("levels=stacked", "dataset.image_size=32", "levels.upper.detach=false", "masking=multiblock"),
    "plain": ("levels=flat", "regularizer=none", "hardware.activation_checkpointing=true", "train.batch_size=48"),
}


def train_all() -> dict[str, Any]:
    """Weights and means of the terms after some steps of every config."""
    results = {}
    for name, overrides in CONFIGS.items():
        t = trainer(*COMMON, *overrides)
        for step in range(STEPS):
            t.meter.add(t.step(*t.batch(step), step))
        results[name] = ({k: v.detach() for k, v in t.model.state_dict().items()}, t.meter.interval())
    return results


def rank(number: int, count: int, port: int, file: str) -> None:
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in names.items()}
    results = train_all()
    if number == 0:
        torch.save(results, file)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of one process, and of two."""
    file = tmp_path_factory.mktemp("ranks") / "results.pt"
    start_processes(rank, (2, free_port(), str(file)), nprocs=2, start_method="spawn")
    return train_all(), torch.load(file)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_with_half_the_batch_each_are_one(name: str, results: Any) -> None:
    (weights, terms), (divided_weights, divided_terms) = (result[name] for result in results)
    assert weights.keys() == divided_weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(divided_weights[key], weight, atol=2e-5, rtol=1e-4)
    assert terms.keys() == divided_terms.keys()
    for key, term in terms.items():
        assert divided_terms[key] == pytest.approx(term, rel=1e-3, abs=1e-5), key


def test_shares_of_a_batch_are_a_partition_within_each_accumulated_part() -> None:
    rows = [World(rank, 4).rows(48, 3) for rank in range(4)]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(48))
    for part in range(3):
        assert all(set((share[4 * part : 4 * part + 4] // 16).tolist()) == {part} for share in rows)
