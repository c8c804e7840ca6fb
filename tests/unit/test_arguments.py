"""Arguments in the order and form that Hydra reads, and the folder that a sweep takes."""

import re
from pathlib import Path

import pytest

from hjepa.config.arguments import RECIPE_GROUPS, arrange, check_options_are_read, without_sweep
from hjepa.config.cli_errors import suggest
from hjepa.config.errors import UserError
from hjepa.config.paths import CONF
from hjepa.sweeps.sweep import take_folder


@pytest.mark.parametrize(
    ("arguments", "arranged"),
    [
        (["seed=0,1", "--multirun", "name=a"], ["--multirun", "seed=0,1", "name=a"]),
        (["a=1", "--config-dir", "conf", "b=2", "-m"], ["--config-dir", "conf", "-m", "a=1", "b=2"]),
        (["a=1", "--cfg", "job", "b=2", "-p", "train"], ["--cfg", "job", "-p", "train", "a=1", "b=2"]),
        (["~task.metric", "a=-1", "--unknown"], ["--unknown", "~task.metric", "a=-1"]),
        ([], []),
    ],
)
def test_flags_may_stand_anywhere(arguments: list[str], arranged: list[str]) -> None:
    assert arrange(arguments) == arranged


def test_values_of_swept_options_are_set_in_every_job_and_others_as_ever() -> None:
    sweep = ["-m", "masking=multiblock,hierarchical", "seed=0,1", "maskingx.a=1"]
    values = ["masking.blocks=3", "+masking.a=[1,2]", "masking.b=null", 'masking.c="x y"']
    moved = r'++hydra.sweeper.params={masking.blocks:"3",+masking.a:"[1,2]",masking.b:"null",masking.c:"\"x y\""}'
    assert arrange([*sweep, *values, "masking.d=1,2"]) == [*sweep, "masking.d=1,2", moved]
    assert arrange(["masking=multiblock", "masking.blocks=3"]) == ["masking=multiblock", "masking.blocks=3"]
    assert arrange(["+sweeps=masking", "masking.a=1"]) == ["+sweeps=masking", '++hydra.sweeper.params={masking.a:"1"}']


def test_the_help_of_a_sweep_shows_what_its_jobs_have_in_common() -> None:
    overrides = ["model=conv_nano,vit_nano", "seed=range(3)", "model.image_size=32", "train.epochs=3", "dataset=cifar10"]
    assert without_sweep(overrides) == ["train.epochs=3", "dataset=cifar10", '++hydra.sweeper.params={model.image_size:"32"}']


def test_swept_recipes_have_their_options_set_in_every_job_and_those_of_the_whole_sweep_stay() -> None:
    sweep = ["experiment=ijepa,cjepa", "seed=0,1", "hardware.slots=2", "hydra.launcher.wait=false", "train.epochs=3"]
    moved = '++hydra.sweeper.params={dataset.root:"data",masking.blocks:"2"}'
    assert arrange([*sweep, "dataset.root=data", "masking.blocks=2"]) == [*sweep, moved]
    assert arrange(["experiment=ijepa", "masking.blocks=2"]) == ["experiment=ijepa", "masking.blocks=2"]


def test_the_groups_of_recipes_are_those_that_recipes_choose() -> None:
    chosen = {
        group
        for file in (CONF / "experiment").glob("*.yaml")
        for group in re.findall(r"override /(\w+):", file.read_text())
        if group not in ("hydra", "hardware", "task", "tracking")
    }
    assert chosen <= set(RECIPE_GROUPS) <= {folder.name for folder in CONF.iterdir()}


def test_the_suggestion_for_a_node_without_options_lists_none() -> None:
    assert suggest("blocks", ["_target_"]) == "."


@pytest.mark.parametrize("argument", ["+sweeps=levels,masking", "sweeps=levels,masking", "+sweeps=[levels,masking]"])
def test_several_prepared_sweeps_at_once_are_refused(argument: str) -> None:
    with pytest.raises(UserError, match=r"one prepared sweep at a time; .*\+sweeps=levels && .*\+sweeps=masking$"):
        arrange([argument, "-m"])


def test_sweeps_that_begin_in_the_same_second_take_folders_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "2026-01-01_00-00-00"
    taken = [take_folder(folder) for _ in range(3)]
    assert [path.name for path in taken] == [folder.name, f"{folder.name}_2", f"{folder.name}_3"]
    assert all(path.is_dir() for path in taken)


OF_RUN = ["dataset=cifar10", "model.features=all", "++train.epochs=3", "~masking", "experiment=ijepa", "seed=1"]


@pytest.mark.parametrize("task", ["evaluate", "export", "features", "visualize"])
@pytest.mark.parametrize("argument", OF_RUN)
def test_options_that_a_task_takes_from_the_run_are_refused(task: str, argument: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(argument)}: task={task} takes .* from the config of the run") as caught:
        check_options_are_read(task, [f"task={task}", "run=outputs/default/photos", argument])
    assert "\n" not in str(caught.value)
    check_options_are_read("train", [argument])


def test_options_that_a_task_reads_from_the_command_are_kept() -> None:
    dataset = ("protocol=[transfer]", "dataset@protocol.transfer.dataset=cifar100", "protocol.transfer.dataset.root=/x")
    options = ("hardware=cpu", "tracking=none", "task.root=/x", "probe.batch_size=8", "output_root=/o", "hydra.verbose=true")
    check_options_are_read("evaluate", ["task=evaluate", "run=/r", *dataset, *options])
