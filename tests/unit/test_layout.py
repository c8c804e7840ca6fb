"""The shape of the package: floors that imports respect, and files that can be read in one go."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

LONGEST_FILE = 350


def test_nothing_imports_from_a_floor_above() -> None:
    """The floors are listed in pyproject.toml, under [tool.importlinter].

    The command runs in a process of its own, because import-linter disables the loggers of the process that it runs in.
    """
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", "pyproject.toml", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "hjepa").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE
