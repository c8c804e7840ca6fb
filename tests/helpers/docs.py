"""Code blocks, commands and example files of the documentation."""

import re
from pathlib import Path

from tests.helpers.runs import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = ROOT / "docs" / "extending.md"


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the commands `python launch.py ...` in the shell blocks of a page."""
    lines = [line.partition(" #")[0].strip() for block in code_blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python launch.py", "hjepa "))]


def example_files() -> dict[str, str]:
    """Return the files of docs/extending.md by their paths; every block begins with a comment that names its file."""
    files = {}
    for block in code_blocks(EXTENDING, "python") + code_blocks(EXTENDING, "yaml"):
        name = re.match(r"# (\S+)\n", block)
        assert name, block
        files[name[1]] = block
    return files
