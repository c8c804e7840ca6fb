"""The launchers accept the options of hydra-submitit-launcher, and leave those of other programs alone."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, LocalQueueConf, SlurmQueueConf

from hjepa.config.errors import UserError
from hjepa.sweeps.launcher import check_numbers
from tests.helpers.runs import compose


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
