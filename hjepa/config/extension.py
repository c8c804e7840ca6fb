"""Which run a config may continue: one with the same identity or, with `extend=true`, one that differs in its length only."""

from glob import escape
from pathlib import Path

from hjepa.config.errors import UserError
from hjepa.config.identity import differences, identity
from hjepa.config.saved import read_config
from hjepa.config.schema import Config

LENGTHS = ("epochs", "steps")  # the keys of `train` that set the length of a run


def without_length(identity: Config) -> Config:
    """Return the identity of a run without its length; that of a benchmark, which has none, as it is."""
    train = {key: value for key, value in identity.get("train", {}).items() if key not in LENGTHS}
    return identity | {"train": train}


def differs_only_in_length(old: Config, new: Config) -> bool:
    """Return whether two identities differ, and differ in nothing but the length of the run."""
    return old != new and without_length(old) == without_length(new)


def is_longer(old: Config, new: Config) -> bool:
    """Return whether the second of two identities sets the same kind of length, epochs or steps, to a larger number."""
    pairs = [(old["train"][key], new["train"][key]) for key in LENGTHS]
    return all((a is None) == (b is None) for a, b in pairs) and all(b > a for a, b in pairs if a is not None)


def check_same_run(folder: Path, config: Config) -> bool:
    """Check that a config may continue the run in a folder, and return whether it makes that run longer.

    Raises:
        UserError: The folder holds a run with another config. The message lists the differences, and the ways out with what each
            of them keeps.
    """
    old, new = identity(read_config(folder)), identity(config)
    changed = differences(old, new)
    if not changed:
        return False
    only_length = differs_only_in_length(old, new)
    longer = only_length and is_longer(old, new)
    if longer and config["extend"]:
        return True
    found = f"{folder} holds a run with another config ({'; '.join(changed)})"
    if only_length and config["extend"]:
        kind, length = next((key, old["train"][key]) for key in LENGTHS if old["train"][key] is not None)
        raise UserError(f"{found}; extend=true makes a run longer: set train.{kind} to more than {length}, and no other length.")
    extend = "extend=true trains this run on to the new length and keeps everything; " if longer else ""
    raise UserError(
        f"{found}. Ways out: {extend}another name keeps this run and trains a new one from scratch; another name with "
        f"init_from={folder} keeps this run and trains a new one from its weights; overwrite=true deletes this run and trains "
        "from scratch."
    )


def find_shorter_run(config: Config, path: Path, prefix: str | None) -> Path:
    """Return the folder of the run that `extend=true` continues.

    Args:
        config: Config of the longer run.
        path: Folder that the config names.
        prefix: Beginning of the names of other runs beside it that may be the shorter one; None if the folder was named.

    Raises:
        UserError: There is no such run, or there are several.
    """
    if (path / "config.yaml").exists():
        return path
    new = identity(config)
    files = sorted(path.parent.glob(f"{escape(prefix)}*/config.yaml")) if prefix else []
    saved = {file.parent: identity(read_config(file.parent)) for file in files}
    same = [folder for folder, old in saved.items() if old == new]
    shorter = [folder for folder, old in saved.items() if differs_only_in_length(old, new)]
    longest = [folder for folder in shorter if is_longer(saved[folder], new)]
    found = same or longest or shorter
    if not found:
        raise UserError(
            f"extend=true: {path if prefix is None else path.parent} holds no run that differs from this one in its length only; "
            "give the name= of that run and all options that it was started with, or leave extend=true out to start a new run."
        )
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise UserError(f"extend=true: several runs differ from this one in their length only; choose one by name=: {names}.")
    return found[0]
