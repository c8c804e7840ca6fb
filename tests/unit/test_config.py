"""Choices, names and identities of configs, and configs of earlier versions."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import hjepa
from hjepa.config.errors import UserError
from hjepa.config.identity import config_hash, identity
from hjepa.config.instantiate import build
from hjepa.config.paths import CONF
from hjepa.config.run import COMMAND, record_command
from hjepa.config.run_path import run_path
from hjepa.config.schema import check, check_node, resolve
from hjepa.config.targets import TARGET, USER_TARGETS, allowed_targets, iter_targets
from hjepa.config.upgrade import RENAMED_TARGETS, upgrade_config, upgrade_names
from tests.helpers.runs import MASKED_GROUPS, compose


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolve(compose("masking=block", "+sweeps=levels", "name=null", "output_root=/o"))


def test_choices_name_the_option_of_every_group(config: dict[str, Any]) -> None:
    choices = config["choices"]
    assert choices["masking"] == "block"
    assert choices["model"] == "conv_nano"
    assert not any(group.startswith("hydra/") for group in choices)
    assert "experiment" not in choices, "no recipe was chosen"


def test_choices_name_the_run_but_do_not_identify_it(config: dict[str, Any]) -> None:
    changed = deepcopy(config)
    changed["choices"]["masking"] = "mine"
    assert config_hash(changed) == config_hash(config)
    digits = config_hash(config)
    assert str(run_path(config)) == f"/o/default/shapes-conv_nano-views-block-infonce-s0-{digits}"
    assert run_path(changed).name == run_path(config).name.replace("block", "mine")


def test_the_precision_is_all_of_the_hardware_that_identifies_a_run(config: dict[str, Any]) -> None:
    changed = deepcopy(config)
    changed["hardware"] |= {"threads": 7, "processes": 2, "slots": 3}
    assert identity(changed) == identity(config)
    changed["hardware"]["precision"] = "float32"
    assert identity(changed) != identity(config)


def test_the_recorded_command_can_be_typed_again() -> None:
    compose("masking=block", "optimizer.betas=[0.9,0.95]")
    record_command()
    assert os.environ[COMMAND].endswith("launch.py masking=block 'optimizer.betas=[0.9,0.95]'")


@pytest.mark.parametrize("key", ["name", "experiment_name"])
@pytest.mark.parametrize("value", ["..", "../x", "../../x", "a/../../x", "/tmp/x", ".", "./", "x" * 300, "実" * 100])
def test_a_name_that_is_no_folder_inside_of_output_root_is_refused(key: str, value: str, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{key}=") as caught:
        run_path(config | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["x", "a/b", "..x", "実験", "a b", "lr=0.1"])
def test_any_name_of_a_folder_inside_of_output_root_is_a_name(value: str, config: dict[str, Any]) -> None:
    assert run_path(config | {"name": value}) == Path("/o/default") / value
    assert run_path(config | {"experiment_name": value, "name": "r"}) == Path("/o") / value / "r"
    assert run_path(config | {"name": ""}) == run_path(config | {"name": None})
    with pytest.raises(UserError, match=r"^experiment_name="):
        run_path(config | {"experiment_name": ""})


@pytest.mark.parametrize("task", ["train", "benchmark"])
def test_a_run_to_read_is_refused_beside_a_task_that_reads_none(task: str) -> None:
    config = resolve(compose(f"task={task}", "run=/o/default/photos"))
    with pytest.raises(UserError, match=r"^run=/o/default/photos names an earlier run, .* extend=true") as caught:
        run_path(config)
    assert "\n" not in str(caught.value)
    run_path(config | {"run": None})


@pytest.mark.parametrize("key", ["init_from", "output_root", "model.pretrained", "dataset.root", "tracking.mlflow.uri"])
def test_a_shell_variable_without_a_value_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}='' is empty .a shell variable without a value"):
        resolve(compose("dataset=cifar10", f"{key}="))


def test_an_option_that_is_missing_is_named(config: dict[str, Any]) -> None:
    node = {key: value for key, value in config["train"].items() if key != "epochs"}
    with pytest.raises(UserError, match=r"hjepa.training.Trainer lacks an option .*'epochs'"):
        build(node, components=None, images=None)


@pytest.mark.parametrize("option", ["threads", "processes", "slots"])
def test_counts_of_the_hardware_are_positive(option: str, config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"hardware.{option}=0: expected PositiveInt.*greater than 0"):
        check_node("hardware", config["hardware"] | {option: 0})


@pytest.mark.parametrize(
    ("option", "values", "bounds"),
    [
        ("mean", [0.5, 0.5], "from 0 to 1"),
        ("mean", [124.0, 116.0, 104.0], "from 0 to 1"),
        ("std", [0.0, 0.0, 0.0], "above 0 and at most 1"),
    ],
)
def test_channels_are_normalized_by_numbers_for_pixels_from_0_to_1(
    option: str, values: list[float], bounds: str, config: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=rf"dataset.{option}=.*one number for each of the three channels, {bounds}, for pixels"):
        check_node("dataset", config["dataset"] | {option: values})


def test_renamed_targets_lead_to_targets_of_this_version() -> None:
    assert set(RENAMED_TARGETS.values()) <= allowed_targets()


def test_the_config_of_an_earlier_version_is_upgraded(config: dict[str, Any]) -> None:
    old = deepcopy({key: value for key, value in config.items() if key != "choices"})
    old["masking"]["_target_"] = "hjepa.masks.Block"
    old["probe"]["neighbours"] = old["probe"].pop("neighbors")
    check(upgrade_config(old))
    assert identity(upgrade_config(old)) == identity(config)
    assert upgrade_names(identity(old)) == identity(config)


def test_every_group_takes_classes_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subclasses of all targets of conf/, named by YAML files elsewhere, pass the checks like their bases."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(USER_TARGETS, "")
    (tmp_path / "own").mkdir()
    options = [option for option in MASKED_GROUPS if not option.startswith("levels=")]
    choices: dict[str, str] = resolve(compose("experiment=smoke", *options, "levels=flat", "tracking=mlflow"))["choices"]
    groups = {group: option for group, option in choices.items() if group not in ("experiment", "debug")}
    for group, option in groups.items():
        text = (CONF / group / f"{option}.yaml").read_text()
        for target in TARGET.findall(text):
            module, _, name = target.rpartition(".")
            base = f"from {module} import {name}" + (f" as Base\nclass {name}(Base): ..." if name[0].isupper() else "")
            (tmp_path / "own" / f"{name.lower()}.py").write_text(base)
            text = text.replace(f"_target_: {target}\n", f"_target_: own.{name.lower()}.{name}\n")
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(text)
    config = resolve(hjepa.compose(*(f"{group}=mine" for group in groups), config_dir=tmp_path / "conf"))
    named = {node["_target_"] for group in groups for _, node in iter_targets(config[group])}
    assert len(named) > 15
    assert {target for target in named if not target.startswith("own.")} <= {"hjepa.data.Augment"}
