"""Names of tracked runs differ in their first characters where the runs differ."""

import os
from pathlib import Path

import pytest

from hjepa.config.identity import config_hash, flatten
from hjepa.config.run_path import run_path
from hjepa.config.schema import resolve
from hjepa.tracking.run_name import SWEPT_VARIABLE, SweptOptions, display_name
from tests.helpers.runs import compose

SHOWN = 20  # characters of a name in MLflow's list of runs


def name_of(*overrides: str) -> str:
    config = resolve(compose(*overrides))
    return display_name(run_path(config), flatten(config), {"config": config_hash(config)})


@pytest.fixture(autouse=True)
def _no_sweep(monkeypatch) -> None:
    monkeypatch.delenv(SWEPT_VARIABLE, raising=False)


def test_runs_of_a_sweep_differ_in_the_first_characters_of_their_names(monkeypatch) -> None:
    monkeypatch.setenv(SWEPT_VARIABLE, '["levels", "seed", "optimizer.lr"]')
    names = [name_of(f"levels={levels}", f"seed={seed}") for levels in ("views", "whole") for seed in (0, 10)]
    names += [name_of("optimizer.lr=0.01"), name_of("optimizer.lr=0.02")]
    assert len({name[:SHOWN] for name in names}) == len(names)
    assert names[0].startswith("s0 views lr=0.")
    assert names[0].endswith(f" {run_path(resolve(compose('levels=views', 'seed=0'))).name}"), "the folder can be copied"


def test_single_runs_differ_in_seed_and_hash() -> None:
    names = [name_of(), name_of("seed=1"), name_of("optimizer.lr=0.01"), name_of("train.epochs=3")]
    assert len({name[:SHOWN] for name in names}) == len(names)


def test_a_name_that_was_given_is_the_name() -> None:
    assert name_of("name=mine") == "mine"


def test_the_options_that_a_sweep_varies_are_those_with_several_values(monkeypatch) -> None:
    monkeypatch.setenv(SWEPT_VARIABLE, "[]")
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from tests.helpers.runs import ROOT

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra_compose("config", ["model=vit_nano", "+sweeps=seeds"], return_hydra_config=True)
    config.hydra.overrides.task = ["model=vit_nano", "levels=views,whole", "optimizer.lr=range(1,3)", "name=x"]
    SweptOptions().on_multirun_start(config)
    assert os.environ[SWEPT_VARIABLE] == '["levels", "optimizer.lr", "seed"]'


def test_the_folder_does_not_depend_on_the_sweep(monkeypatch) -> None:
    """A run is found again, whether it was started by a sweep or alone."""
    config = resolve(compose("seed=1"))
    alone = run_path(config)
    monkeypatch.setenv(SWEPT_VARIABLE, '["seed"]')
    assert run_path(config) == alone
    assert isinstance(alone, Path)
