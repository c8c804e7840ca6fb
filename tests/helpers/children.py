"""Child processes with torch already loaded, so that tests can start, starve and kill many of them quickly.

A process that loads torch, timm and MLflow by itself needs about ten seconds of processor time before it does anything. The
processes here are forked from a server that has loaded them once; they are otherwise independent processes.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from hjepa.config.errors import UserError
from tests.helpers.runs import ROOT

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        *("hjepa.tasks.train", "hjepa.tracking.mlflow", "mlflow.store.tracking.sqlalchemy_store", "tests.helpers.runs"),
        "tests.helpers.freeze",
    ]
)


def begin(target: Any, *args: Any) -> ForkServerProcess:
    """Start a function of a test module in a child process."""
    process = server.Process(target=target, args=args)
    process.start()
    return process


def start(*overrides: str, output: Path, errors: Path, cwd: Path = ROOT, **env: str) -> ForkServerProcess:
    """Start `python launch.py ...` in a child process, which writes what it prints to two files."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return begin(run_command, list(overrides), output, errors, cwd, environment)


def launch(*overrides: str, cwd: Path = ROOT, timeout: float = 500, **env: str) -> subprocess.CompletedProcess[str]:
    """Do what `tests.helpers.runs.launch` does, faster; not for tests of what is imported, or of PYTHONPATH."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = start(*overrides, output=output, errors=errors, cwd=cwd, **env)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(overrides, timeout, output.read_text(), errors.read_text())
        return subprocess.CompletedProcess(overrides, process.exitcode, output.read_text(), errors.read_text())


def run_command(overrides: list[str], output: Path, errors: Path, cwd: Path, env: dict[str, str]) -> None:
    """Run launch.py in a child process as the main program."""
    redirect(output, 1)
    redirect(errors, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [str(ROOT / "launch.py"), *overrides]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing omits


def redirect(file: Path, *descriptors: int) -> None:
    """Let descriptors of this process write to a file."""
    with file.open("a") as target:
        for descriptor in descriptors:
            os.dup2(target.fileno(), descriptor)


def run_config(overrides: list[str], output: Path, memory: int | None = None) -> None:
    """Run a config in a child process; exit with 1 after a `UserError`, and with 3 after any other error.

    Args:
        overrides: Overrides of the config.
        output: File that receives everything the process prints.
        memory: Bytes that the process may allocate beyond what it has.
    """
    redirect(output, 1, 2)
    from hjepa.config.run import run
    from tests.helpers.runs import compose

    cfg = compose(*overrides)
    if memory:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        run(cfg)
    except UserError as error:
        print(error, flush=True)
        os._exit(1)
    except Exception:
        traceback.print_exc()
        os._exit(3)
