"""The end of a multirun: one table of all its jobs, the failed ones with their reasons."""

import atexit
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hjepa.errors import UserError
from hjepa.folder import refuse_unwritable


class SweepTable(Callback):
    """Collects the jobs of a multirun that ran in this process and prints their table when it exits."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            refuse_unwritable(Path(config.hydra.sweep.dir).expanduser().absolute())
        except UserError as error:
            sys.exit(str(error))  # Hydra would only warn of any other exception here, and fail later
        atexit.register(self.print_table)  # Hydra does not call on_multirun_end when a job failed

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        overrides = " ".join(job_return.overrides or [])
        if job_return.status == JobStatus.COMPLETED:
            value = job_return.return_value
            self.rows.append((overrides, "finished", "" if value is None else f"linear probe {value:.1%}"))
        else:
            reason = str(job_return._return_value).splitlines()
            self.rows.append((overrides, "FAILED", reason[0] if reason else "no reason given"))

    def print_table(self) -> None:
        """One line per job: what was varied, how it ended, its result or its reason."""
        if not self.rows:  # nothing ran in this process
            return
        width = max((len(row[0]) for row in self.rows), default=0)
        print("\nSweep:")
        for number, (overrides, state, result) in enumerate(self.rows):
            print(f"{number:3d}  {overrides:<{width}}  {state:<8}  {result}")
