"""Child processes with torch already loaded, so that tests can start, starve and kill many of them quickly."""

import multiprocessing
import os
import sys
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from hjepa.config.errors import UserError

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["hjepa.tasks.train", "hjepa.tracking.mlflow", "mlflow", "tests.helpers.runs"])


def begin(target: Any, *args: Any) -> ForkServerProcess:
    """Start a function of a test module in a child process."""
    process = server.Process(target=target, args=args)
    process.start()
    return process


def run_config(overrides: list[str], output: Path, memory: int | None = None) -> None:
    """Run a config in a child process; exit with 1 after a `UserError`, and with 3 after any other error.

    Args:
        overrides: Overrides of the config.
        output: File that receives everything the process prints.
        memory: Bytes that the process may allocate beyond what it has.
    """
    with output.open("a", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
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
