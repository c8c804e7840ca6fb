"""The wheel, installed into a new environment: the command `hjepa` works from any folder, without the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, TINY

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (file,) = folder.glob("hjepa-*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a virtual environment with the wheel, which borrows the dependencies of the current environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    return folder


@pytest.fixture
def hjepa(environment: Path, tmp_path: Path) -> Command:
    """Run a program of the new environment in a temporary folder."""

    def run(*arguments: str, program: str = "hjepa") -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HJEPA_", "PYTHON"))}
        command = [str(environment / "bin" / program), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)

    return run


def test_the_wheel_contains_all_files_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    def files(folder: str, *patterns: str) -> set[str]:
        return {str(file.relative_to(ROOT)) for pattern in patterns for file in (ROOT / folder).rglob(pattern)}

    assert files("hjepa", "*.py", "*.pyi", "*.html", "py.typed") <= names
    assert files("hydra_plugins", "*.py") <= names
    assert {f"hjepa/_files/{name}" for name in files("conf", "*.yaml") | files("sweeps", "*.yaml")} <= names
    assert {name.split("/")[0].removesuffix(".dist-info") for name in names} == {
        "hjepa",
        "hydra_plugins",
        wheel.name.removesuffix("-py3-none-any.whl"),
    }


@pytest.mark.thorough
def test_the_command_trains_into_the_current_folder(hjepa: Command, tmp_path: Path) -> None:
    result = hjepa(*TINY, "train.epochs=1", "name=r")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    folder = tmp_path / "outputs" / "default" / "r"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert result.stdout.strip().endswith(f"Run folder: {folder}")
    again = hjepa("task=features", f"run={folder}", f"task.images={ROOT}/docs", "task.out=f.npy", "task.workers=0", *TINY[-3:])
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "f.npy").exists()


def test_the_command_finds_its_options_and_sweeps(hjepa: Command, tmp_path: Path) -> None:
    help_text = hjepa("--help")
    assert help_text.returncode == 0
    assert "masking: block" in help_text.stdout
    sweep = hjepa("+sweeps=seeds", "--cfg", "hydra")
    assert "seed: 0,1,2,3,4" in sweep.stdout
    job = hjepa("+sweeps=seeds", "experiment=cifar10", "--cfg", "job", "--resolve")
    assert f"output_root: {tmp_path}/outputs" in job.stdout
    unknown = hjepa("modle=vit_small")
    assert (unknown.returncode, "did you mean model?" in unknown.stderr) == (1, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_sweep_runs_in_processes_of_the_installed_package(hjepa: Command, tmp_path: Path) -> None:
    result = hjepa("--multirun", *TINY, "train.epochs=1", "seed=0,1")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "outputs" / "default").iterdir())) == 2
