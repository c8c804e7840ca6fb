"""A sweep: its jobs, planned before anything starts, and what is known of them in the sweep folder.

A launcher plans the jobs, runs them wherever it does, calls `write` whenever a job's state changes, and `end` at last. All
results come from the run folders, so the table and the plot can be made anew at any time (`task=sweep`).

    sweep.json   the jobs, their states and results        table.txt, sweep.png, progress.png   for people
    N.log        what job N said
"""

from pathlib import Path

from hjepa.config.schema import Config
from hjepa.sweeps.sweep import Sweep, check_metric
from hjepa.tracking.run_folder import check_writable


def show_sweep(config: Config, path: Path, folder: str, metric: str | None) -> None:
    """`task=sweep`: table and plot of a sweep anew, from its run folders as they are now.

    Args:
        folder: of the sweep; metric: see `Sweep.end`.
    """
    sweep = Sweep(Path(folder).expanduser().absolute())
    check_writable(sweep.folder)
    jobs = sweep.read()
    sweep.refresh(jobs)
    check_metric(jobs, metric)
    sweep.end(jobs, metric)
