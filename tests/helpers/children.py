"""Child processes that have torch loaded before they begin: what is killed, starved or started eight times must start fast."""

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
    """Start a function of a test module in a child."""
    process = server.Process(target=target, args=args)
    process.start()
    return process


def run_config(overrides: list[str], said: Path, memory: int | None = None) -> None:
    """Run a config in a child; what it says goes to a file. Exits 1 after one sentence, or 3 after a stack trace.

    Args:
        memory: bytes that it may allocate beyond what it has.
    """
    with said.open("a", buffering=1) as file:
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
