"""Nothing in a file or config from elsewhere is executed."""

import os
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hydra.conf import ConfigSourceInfo, RuntimeConf
from torchvision import datasets

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build
from hjepa.config.schema import check, resolve
from hjepa.config.targets import USER_TARGETS, allow_targets_of_command_line, allowed_targets, hjepa_targets
from hjepa.data.torchvision_datasets import TorchvisionDataset
from hjepa.sweeps.job import Job
from hjepa.sweeps.queue import saved_outcome
from hjepa.tracking.run_folder import RunFolder
from tests.helpers.runs import ROOT, compose
from tests.unit.test_data import COMMON

EVIL = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "hjepa.config.schema.os.system",  # reached through a module of ours
    "hjepa.tracking.run_folder.shutil.rmtree",
    "hjepa.config.schema.check_type",  # ours, but evaluates its argument
    "hjepa.config.instantiate.build",
    "hjepa.tracking.atomic.atomic_write",
    "hydra.utils.get_method",
    "hydra.utils.instantiate",
    "functools.partial",
    "torch.load",
    "torch.hub.load",
    "torchvision.datasets.utils.download_url",
    "timm.create_model",
    "",
    None,
    ["os.system"],
]


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return resolve(compose())


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize("place", ["masking", "model.encoder", "schedule.lr", "optimizer.betas"])
def test_a_target_that_conf_does_not_name_is_never_called(
    target: object, place: str, composed: dict[str, Any], tmp_path: Path
) -> None:
    config = deepcopy(composed)
    *parents, last = place.split(".")
    node = config
    for key in parents:
        node = node[key]
    evil = {"_target_": target, "_args_": [f"touch {tmp_path}/owned"]}
    node[last] = [evil] if place == "optimizer.betas" else evil
    with pytest.raises(UserError, match=rf"{place}.*_target_=.*is not allowed, because no YAML file in conf/ names it"):
        check(config)
    with pytest.raises(UserError, match=r"_target_=.*is not allowed"):
        build(config[place.split(".")[0]])
    assert not list(tmp_path.iterdir())


def test_positional_arguments_are_refused_because_they_bypass_the_schema(composed: dict[str, Any]) -> None:
    config = deepcopy(composed)
    config["tracking"]["mlflow"]["_args_"] = ["uri"]
    with pytest.raises(UserError, match=r"tracking.mlflow: _args_.*by its name"):
        check(config)


def test_conf_names_only_targets_of_this_package() -> None:
    assert len(hjepa_targets()) > 30
    assert all(target.startswith("hjepa.") for target in hjepa_targets())


def source(provider: str, path: Path) -> ConfigSourceInfo:
    return ConfigSourceInfo(path=str(path), schema="file", provider=provider)


def test_only_group_folders_of_the_command_line_add_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_TARGETS, "")
    for name in ("top", "masking/nested/mine", "own/mine", "outputs/run/config", "conf/hydra/launcher/mine"):
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'"_target_": "{name.replace("/", ".")}"')
    choices = {"masking": "nested/mine", "own@model.encoder": "mine", "hydra/launcher": "submitit_local"}
    sources = [source("command-line", tmp_path), source("hydra.searchpath in main", tmp_path / "outputs" / "run")]
    allow_targets_of_command_line(RuntimeConf(choices=choices, config_sources=sources))
    assert allowed_targets() - hjepa_targets() == {"top", "masking.nested.mine", "own.mine"}
    allow_targets_of_command_line(RuntimeConf(choices=choices, config_sources=[source("command-line", ROOT)]))
    assert allowed_targets() == hjepa_targets(), "the checkout holds outputs/, so it is no config folder"


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.path),)


def test_a_pickle_in_a_dataset_folder_is_not_loaded(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "data" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in datasets.CIFAR10.train_list:
        (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "owned")))
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(UserError, match="could not be downloaded"):
        TorchvisionDataset("CIFAR10", str(tmp_path / "data"), **COMMON).load("train")
    assert not (tmp_path / "owned").exists()


def test_the_result_of_a_job_is_read_as_data(tmp_path: Path) -> None:
    (tmp_path / "1_0_result.pkl").write_bytes(pickle.dumps(("success", Touch(tmp_path / "owned"))))
    assert saved_outcome(Job(0, [], None, log=tmp_path / "1_0_log.out")) is None
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mknod [{}/owned]", "seed: {{", "- 1"])
def test_the_config_of_a_run_folder_is_read_as_data(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.yaml").write_text(text.format(tmp_path))
    with pytest.raises(UserError, match=r"config.yaml"):
        RunFolder(folder, resolve(compose())).check_same_config()
    assert not (tmp_path / "owned").exists()
