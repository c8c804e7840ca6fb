"""What README shows is true."""

import re

import torch
import yaml

from hjepa import masking as masks
from tests.helpers.runs import ROOT
from tests.unit.test_masking import check_contract

README = (ROOT / "README.md").read_text()


def block(language: str, start: str) -> str:
    """The code block of a language that contains `start`."""
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if start in b)


def test_the_example_strategy_works_as_written() -> None:
    code = dict(vars(masks))
    exec(block("python", "class Checkerboard"), code)
    options = yaml.safe_load(block("yaml", "Checkerboard"))
    assert options.pop("_target_") == "hjepa.masking.Checkerboard"
    for pools in ([1], [1, 2]):
        sampler = code["Checkerboard"](8, pools, **options)
        check_contract(sampler(3, torch.Generator()), 8, pools, 3)


def test_the_table_lists_every_option_of_every_group() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE))
    rows["experiment"] = README[README.index("| recipe |") : README.index("## Comparing")]
    for folder in sorted((ROOT / "conf").iterdir()):
        if folder.is_dir() and folder.name != "hydra":
            there = {p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_")}
            assert there <= set(re.findall(r"`(\w+)`", rows[folder.name])), folder.name
