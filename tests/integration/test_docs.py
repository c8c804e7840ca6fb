"""README and the pages of docs/ are true: commands compose, tables are complete, links lead somewhere, the site builds."""

import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from hjepa.config.schema import check, resolve
from tests.helpers.docs import EXTENDING, PAGES, commands
from tests.helpers.runs import ROOT, compose
from tests.integration.test_extending import OWN


def expand(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep, or the overrides themselves."""
    choices: list[list[str]] = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        choices.append([f"{text.partition('=')[0]}={value}" for value in swept(override)] or [text])
    return [list(job) for job in product(*choices)]


def swept(override: Override) -> list[object]:
    """Return the values of a sweep, or the ends of an interval; empty for an override that sets one value."""
    if override.is_interval_sweep():
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        return [interval.start, interval.end]
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else []


COMMANDS = [(page, command) for page in PAGES for command in commands(page) if "--config-dir" not in command]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.stem}: {command}" for page, command in COMMANDS])
def test_every_command_composes_and_passes_the_checks(page: Path, command: str) -> None:
    words = shlex.split(command.replace("$PWD", "/tmp"))
    overrides = [word for word in words[words.index("launch.py") + 1 if "launch.py" in words else 1 :] if word[:2] != "--"]
    for job in expand(overrides):
        check(resolve(compose(*job)))


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30


def test_every_example_of_extending_is_trained_by_its_test() -> None:
    words = [word for command in commands(EXTENDING) for word in shlex.split(command)]
    assert set(words) - {"hjepa", "--config-dir", "conf"} == set(OWN) - {"experiment_name=default"}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "configuration.md"], ids=["README", "configuration"])
def test_the_table_lists_every_option_of_every_group(page: Path) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page.read_text(), re.MULTILINE))
    rows["experiment"] = (ROOT / "docs" / "recipes.md").read_text()
    for folder in sorted((ROOT / "conf").iterdir()):
        if folder.is_dir() and folder.name != "hydra":
            options = {file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_")}
            assert options <= set(re.findall(r"`(\w+)`", rows[folder.name])), folder.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_site_builds(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {entry for group in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for entry in flatten_nav(group)}
    assert pages == {page.name for page in (ROOT / "docs").glob("*.md")}, "every page is in the navigation"


def flatten_nav(entry: object) -> list[str]:
    """Return the file names in a part of mkdocs' navigation."""
    if isinstance(entry, dict):
        return [name for value in entry.values() for name in flatten_nav(value)]
    return [name for value in entry for name in flatten_nav(value)] if isinstance(entry, list) else [str(entry)]
