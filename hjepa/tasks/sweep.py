"""`task=sweep`: make the table and the plots of a sweep again, from its run folders as they are now."""

from pathlib import Path

from hjepa.config.schema import Config
from hjepa.sweeps.local import update_from_processes
from hjepa.sweeps.slurm import update_from_slurm
from hjepa.sweeps.sweep import Sweep, check_metric
from hjepa.tracking.run_folder import check_writable


def show_sweep(config: Config, path: Path, folder: str, metric: str | None) -> None:
    """Print, plot and save the results of a sweep, and log them to the trackers of its runs.

    Args:
        config: The resolved config.
        path: Unused; the task makes no run.
        folder: Sweep folder.
        metric: Dotted key of summary.json to compare by. None: the linear probe, or the speed of benchmarks.
    """
    sweep = Sweep(Path(folder).expanduser().absolute())
    check_writable(sweep.folder, "make it writable, or copy the sweep and its runs elsewhere")
    jobs = sweep.load()
    sweep.refresh(jobs)
    update_from_slurm(jobs)
    update_from_processes(jobs)
    check_metric(jobs, metric)
    sweep.summarize(jobs, metric, config, save=not sweep.has_changed())
