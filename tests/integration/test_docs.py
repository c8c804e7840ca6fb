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

from hjepa.config.schema import check, resolve
from tests.helpers.runs import ROOT, compose

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the commands `python launch.py ...` in the shell blocks of a page."""
    lines = [line.partition(" #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python launch.py", "hjepa "))]


def expand(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep, or the overrides themselves."""
    choices: list[list[str]] = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        values = override.sweep_string_iterator() if override.is_sweep_override() else None
        choices.append([f"{text.partition('=')[0]}={value}" for value in values] if values else [text])
    return [list(job) for job in product(*choices)]


COMMANDS = [(page, command) for page in PAGES for command in commands(page) if "--config-dir" not in command]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page.stem}: {command}" for page, command in COMMANDS])
def test_every_command_composes_and_passes_the_checks(page: Path, command: str) -> None:
    words = shlex.split(command.replace("$PWD", "/tmp"))
    overrides = [word for word in words[words.index("launch.py") + 1 if "launch.py" in words else 1 :] if word[:2] != "--"]
    for job in expand(overrides):
        check(resolve(compose(*job)))


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30


def write_example(folder: Path) -> None:
    """Write the files of docs/extending.md: every block begins with a comment that names its file."""
    for language in ("python", "yaml"):
        for block in blocks(ROOT / "docs" / "extending.md", language):
            name = re.match(r"# (\S+)\n", block)
            assert name, block
            file = folder / name[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)


@pytest.mark.parametrize("command", [c for c in commands(ROOT / "docs" / "extending.md") if "--config-dir" in c])
def test_every_example_of_extending_trains(command: str, tmp_path: Path) -> None:
    """Run the command as it is typed, in a folder with the files of the page, for two steps."""
    write_example(tmp_path)
    words = shlex.split(command.replace("python launch.py", f"{sys.executable} {ROOT / 'launch.py'}", 1))
    short = ["debug=small", "tracking=none", "probe=none", "hardware=cpu", "hardware.threads=1", "output_root=out", "name=r"]
    done = subprocess.run([*words, *short], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 steps in" in done.stdout


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
