"""Files and configs from strangers: nothing in them is executed."""

import os
import pickle
from pathlib import Path

import pytest
from torchvision import datasets

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build
from hjepa.config.schema import allowed_targets, check, resolve
from hjepa.data.torchvision_datasets import TorchvisionDataset
from hjepa.tracking.run_folder import RunFolder
from tests.helpers.runs import compose
from tests.unit.test_data import COMMON

EVIL = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "hjepa.config.schema.os.system",  # through a module of ours
    "hjepa.tracking.run_folder.shutil.rmtree",
    "hjepa.config.schema.check_type",  # ours, but evaluates what it is given
    "hjepa.config.instantiate.build",
    "hjepa.training.checkpoint.save_atomically",
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


@pytest.mark.parametrize("target", EVIL)
@pytest.mark.parametrize("place", ["masking", "model.encoder", "schedule.lr", "optimizer.betas"])
def test_only_what_conf_names_is_called(target: object, place: str, tmp_path: Path) -> None:
    config = resolve(compose())
    *parents, last = place.split(".")
    node = config
    for key in parents:
        node = node[key]
    evil = {"_target_": target, "_args_": [f"touch {tmp_path}/owned"]}
    node[last] = [evil] if place == "optimizer.betas" else evil
    with pytest.raises(UserError, match=rf"{place}.*_target_=.*nothing that a config may call"):
        check(config)
    with pytest.raises(UserError, match=r"_target_=.*nothing that a config may call"):
        build(config[place.split(".")[0]])
    assert not list(tmp_path.iterdir())


def test_arguments_by_position_would_escape_the_check(tmp_path: Path) -> None:
    config = resolve(compose())
    config["tracking"]["mlflow"]["_args_"] = ["uri"]
    with pytest.raises(UserError, match=r"tracking.mlflow: _args_.*by their names"):
        check(config)


def test_everything_that_conf_names_is_ours() -> None:
    assert len(allowed_targets()) > 30
    assert all(target.startswith("hjepa.") for target in allowed_targets())


class Touch:
    """Pickled, it creates a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.path),)


def test_a_pickle_in_a_data_set_is_not_loaded(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "data" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in datasets.CIFAR10.train_list:
        (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "owned")))
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(UserError, match="could not be downloaded"):
        TorchvisionDataset("CIFAR10", str(tmp_path / "data"), **COMMON).load("train")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mknod [{}/owned]", "seed: {{", "- 1"])
def test_the_config_of_a_run_folder_is_data(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.yaml").write_text(text.format(tmp_path))
    with pytest.raises(UserError, match=r"config.yaml"):
        RunFolder(folder, resolve(compose())).check_same_config()
    assert not (tmp_path / "owned").exists()
