"""Arguments of the command line, arranged so that Hydra reads them as they are meant."""

import re
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from hjepa.config.errors import UserError
from hjepa.config.paths import CONF, FILES, PROGRAM
from hjepa.config.quoting import parse, quote

# The groups that define what a run learns, from which images and how.
GROUPS_OF_RUN = (
    *("model", "levels", "masking", "loss", "regularizer", "projector", "teacher"),
    *("optimizer", "schedule", "dataset"),
)

# The groups whose options recipes choose. The hardware is not among them: a sweep reads its slots from its own config.
RECIPE_GROUPS = (*GROUPS_OF_RUN, "probe")

READERS = ("evaluate", "export", "features", "visualize")  # tasks that take a run as it was trained

OPTIONS_OF_RUN = (*GROUPS_OF_RUN, "train", "checkpoint", "experiment", "seed", "init_from")

# What else to write instead of such an option, as the end of a sentence.
OTHER_WAYS = {
    "dataset": (
        ", set task.root=FOLDER if the images of the run were moved, or score on another dataset with task=evaluate "
        "'protocol=[transfer]' dataset@protocol.transfer.dataset=cifar100"
    ),
    "checkpoint": ", or choose a checkpoint of the run with task.checkpoint=latest",
}


def check_options_are_read(task: str | None, overrides: Sequence[str]) -> None:
    """Refuse options that a task takes from the config of the run that it reads, since it would ignore them.

    Args:
        task: Chosen option of the group `task`.
        overrides: Options and values of the command.

    Raises:
        UserError: The task reads a run, and one of the overrides sets what the run was trained with.
    """
    for argument in overrides if task in READERS else ():
        key = re.match(r"[+~]*(\w+)(?=[.=]|$)", argument)  # not dataset@protocol.transfer.dataset
        if key and key[1] in OPTIONS_OF_RUN:
            raise UserError(
                f"{argument}: task={task} takes {key[1]} from the config of the run, where it was set for training; leave it out"
                f"{OTHER_WAYS.get(key[1], ', or train another run with it')}."
            )


def arrange(arguments: Sequence[str]) -> list[str]:
    """Reorder the arguments for Hydra: flags first, and options of swept groups as parameters of the sweeper.

    Flags come first, because Hydra's parser does not read overrides on both sides of a flag. A value of a swept option, such as
    `masking.scale=0.2` beside `masking=block,multiblock`, becomes a parameter of the sweeper, which sets it in every job; Hydra
    would otherwise set it in the config of the whole sweep, which has none of these options. A swept `experiment` chooses the
    options of other groups, whose values are then set in every job as well.

    Raises:
        UserError: Several prepared sweeps are chosen.
    """
    overrides = get_args_parser().parse_known_intermixed_args(arguments)[0].overrides
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    check_one_sweep(overrides)
    swept = swept_groups(overrides)
    prefixes = tuple(f"{group}." for group in (*swept, *(RECIPE_GROUPS if "experiment" in swept else ())))
    values = {a.partition("=")[0]: a.partition("=")[2] for a in overrides if a.lstrip("+").startswith(prefixes) and is_value(a)}
    others = [argument for argument in overrides if argument.partition("=")[0] not in values]
    entries = ",".join(f"{key}:{quote(value)}" for key, value in values.items())
    return [*flags, *others, *([f"++hydra.sweeper.params={{{entries}}}"] if values else [])]


def without_sweep(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a sweep that hold for all of its jobs: without swept keys and options of swept groups."""
    parsed = ((argument, parse(argument)) for argument in arrange(overrides))
    return [argument for argument, override in parsed if not (override and override.is_sweep_override())]


def is_value(argument: str) -> bool:
    """Return whether an argument sets one value, which Hydra can read."""
    override = parse(argument)
    return bool(override) and not override.is_sweep_override() and not override.is_delete()  # type: ignore[union-attr]


def check_one_sweep(overrides: Sequence[str]) -> None:
    """Refuse several prepared sweeps at once: each has its own options, recipe and folder."""
    for argument in overrides:
        key, _, names = argument.lstrip("+").partition("=")
        if key == "sweeps" and "," in names:
            commands = " && ".join(f"{PROGRAM} +sweeps={name.strip()}" for name in names.strip("[]'\"").split(","))
            raise UserError(f"{argument}: one prepared sweep at a time; start them one after the other: {commands}")


def swept_groups(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the options of every config group that is swept, on the command line or by a prepared sweep."""
    swept: dict[str, list[str]] = {}
    for argument in [*prepared_sweep(overrides), *overrides]:
        override = parse(argument)
        if override and override.is_discrete_sweep() and (CONF / override.key_or_group).is_dir():
            swept[override.key_or_group] = [str(option) for option in override.sweep_string_iterator()]
    return swept


def prepared_sweep(overrides: Sequence[str]) -> list[str]:
    """Return what the prepared sweep of a command line sweeps; empty if there is none."""
    for name in (argument.partition("=")[2] for argument in overrides if argument.lstrip("+").startswith("sweeps=")):
        file = FILES / "sweeps" / f"{name}.yaml"
        params = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") if file.is_file() else None
        return [f"{key}={value}" for key, value in (params or {}).items()]
    return []
