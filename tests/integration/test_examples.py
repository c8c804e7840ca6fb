"""The examples run as their texts say."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import hjepa
from tests.helpers.children import launch
from tests.helpers.runs import BRIEF, ROOT, tiny

EXAMPLES = ROOT / "examples"

SMALL = """\
config = hjepa.compose(*{overrides}, "name=quickstart")
config.train.epochs = 1"""


@pytest.mark.thorough
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is committed without outputs"
    (settings,) = (cell for cell in notebook.cells if cell.cell_type == "code" and "hjepa.compose(" in cell.source)
    settings.source = SMALL.format(overrides=list(BRIEF))
    monkeypatch.delenv("HJEPA_HOME")
    monkeypatch.delenv("MPLBACKEND")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert text.count("of the test images are right") == 2
    assert any("9/9" in output.text for output in outputs if output.get("name") == "stderr"), "the progress bar is shown"
    assert (tmp_path / "outputs" / "default" / "quickstart" / "summary.json").exists()


@pytest.mark.thorough
def test_the_search_finds_the_query_and_its_copy_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        (tmp_path / "images" / "sub").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST).save(tmp_path / "images" / "sub" / f"{i}.png")
    run = hjepa.train(hjepa.compose(*tiny("train.epochs=1", f"output_root={tmp_path}/out", "name=r")))

    def search(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / "search_images.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True, timeout=300, check=False)

    query = tmp_path / "images" / "sub" / "3.png"
    result = search(run.folder, tmp_path / "images", query, "--top", 3)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0] == f"1.000  {query}"
    missing = search(run.folder, tmp_path / "missing", query)
    assert (missing.returncode, missing.stderr) == (
        1,
        f"{tmp_path}/missing is not a folder; for single images, pass a list of their paths.\n",
    )


def test_the_checkerboard_trains_and_checks_its_option(tmp_path: Path) -> None:
    own, overrides = ("--config-dir", "examples/checkerboard/conf"), ("experiment=ijepa", "masking=checkerboard")
    result = launch(*own, *tiny(*overrides, "train.epochs=1", "name=r", f"output_root={tmp_path}"))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "ijepa" / "r" / "summary.json").read_text())["status"] == "finished"
    refused = launch(*own, *overrides, "masking.offset=2", f"output_root={tmp_path}")
    assert refused.returncode == 1
    assert "masking.offset=2" in refused.stderr


def test_the_checkerboard_divides_the_cells_of_every_level() -> None:
    import torch

    from examples.checkerboard.masks import Checkerboard

    masks = Checkerboard(grid=8, pools=[1, 2], offset=0)(3, torch.Generator())
    context, (patches, cells) = masks.context, masks.targets
    assert sorted([*context[0, 0].tolist(), *patches[0, 0, 0].tolist()]) == list(range(64))
    assert cells[0, 0, 0].tolist() == [0, 2, 5, 7, 8, 10, 13, 15]
