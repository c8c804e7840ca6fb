"""Fixtures that all tests share, and the order in which test files run."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import LoadScopeScheduling

from hjepa.distributed.resources import num_cores
from tests.helpers.cluster import cluster
from tests.helpers.runs import compose, tiny
from tests.helpers.typecheck import check_types

# Check the annotated shapes of tensors at run time, in modules that are imported from here on.
install_import_hook(["hjepa.losses", "hjepa.masking", "hjepa.models"], "tests.helpers.typecheck.check_types")

# The same examples in every run, and no limit on the time of one, which other tests slow down.
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")

__all__ = ["check_types", "cluster"]  # the type checker of the hook, and a fixture of the whole session

# The files that take longest are begun first, so that no process is left alone with one at the end.
LONGEST = (
    "test_slurm",
    "test_slurm_accounting",
    "test_distributed",
    "test_machine_errors",
    "test_sweep",
    "test_kills",
    "test_tracking",
    "test_resume",
    "test_cli",
    "test_local_sweep",
)


# The tests of these files take long and share no fixture: any process may run any of them. Those of other files stay together.
INDEPENDENT = (
    *("test_cli", "test_examples", "test_extend", "test_kills", "test_local_sweep", "test_machine_errors"),
    *("test_mlflow_copies", "test_progress", "test_recipes", "test_resume", "test_sweep", "test_tracking"),
)


class Scheduling(LoadScopeScheduling):
    """Gives the tests of a file to the same process, except those of `INDEPENDENT`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if Path(file).stem in INDEPENDENT else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Return the object that distributes the tests."""
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by `LONGEST`; the order within a file stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Exclude the loaded modules from garbage collection."""
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
