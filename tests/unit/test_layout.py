"""The shape of the package: floors that imports respect, and files that can be read in one go."""

from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.helpers.runs import ROOT

LONGEST_FILE = 350


def test_nothing_imports_from_a_floor_above(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The floors are listed in pyproject.toml, under [tool.importlinter]."""
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((ROOT / "hjepa").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long_to_read(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE
