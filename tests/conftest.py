"""Fixtures that all tests share, and the order in which test files run."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from hjepa.distributed.resources import num_cores
from tests.helpers.cluster import cluster
from tests.helpers.runs import compose, tiny
from tests.helpers.typecheck import check_types

# Check the annotated shapes of tensors at run time, in modules that are imported from here on.
install_import_hook(["hjepa.losses", "hjepa.masking", "hjepa.models"], "tests.helpers.typecheck.check_types")

__all__ = ["check_types", "cluster"]  # the type checker of the hook, and a fixture of the whole session

# The files that take longest are begun first, so that no process is left alone with one at the end.
LONGEST = (
    "test_slurm",
    "test_distributed",
    "test_machine_errors",
    "test_sweep",
    "test_kills",
    "test_tracking",
    "test_resume",
    "test_cli",
    "test_local_sweep",
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by `LONGEST`, and choose which tests one process runs: those of a file that share a fixture.

    Unit tests, which are short, stay with those of their file.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        alone = "integration" in item.path.parts and not shares_a_fixture(item)
        item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else item.path.stem))


def shares_a_fixture(item: pytest.Item) -> bool:
    """Return whether a test uses a fixture that is made once for a file or for all of them."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    return any(fixture.scope in ("module", "session") for (*_, fixture) in fixtures if "tests" in fixture.baseid)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the modules."""
    import_module("tests.helpers.freeze")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Let torch compute in one thread, since tests run side by side; an earlier test may have set more."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers of `-n auto`: twice the cores, since integration tests wait for processes most of the time."""
    return 2 * num_cores()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., float | None]:
    """Run a tiny config with further overrides in this process, under `tmp_path`."""
    from hjepa.config.run import run as run_config

    def run_tiny(*overrides: str) -> float | None:
        return run_config(compose(f"output_root={tmp_path}", *tiny(*overrides)))

    return run_tiny
