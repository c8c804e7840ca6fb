"""`task=report`: everything there is to say about a run or a sweep in one HTML file, which needs nothing else and no network.

The file is put together from what is in the folder: it can be made at any time, also of a run that goes on or failed.
"""

from pathlib import Path

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.sweeps.sweep import Sweep, track
from hjepa.tasks.report.html import render
from hjepa.tasks.report.run_page import about_run
from hjepa.tasks.report.sweep_page import about_sweep
from hjepa.tasks.trained_run import run_folder
from hjepa.tracking.run_folder import refuse_unwritable, write_whole
from hjepa.tracking.tracker import Addition, give


def report(config: Config, path: Path, sweep: str | None) -> None:
    """Write the report of the run that `run` names, or of a sweep.

    Args:
        sweep: folder of the sweep, instead of `run`.

    Raises:
        UserError: neither is given, or both, or the folder holds no run or sweep.
    """
    if (config["run"] is None) == (sweep is None):
        given = "both were given" if sweep else "neither was given"
        raise UserError(f"task=report needs run=outputs/default/NAME or task.sweep=outputs/sweeps/NAME; {given}.")
    if sweep is None:
        folder = run_folder(config)
        write(folder, "run.html", about_run(folder))
        give(config, folder, Addition([folder / "report.html"], "report"))
        return
    its = Sweep(Path(sweep).expanduser().absolute())
    jobs = its.read()
    its.refresh(jobs)
    write(its.folder, "sweep.html", about_sweep(its.folder, jobs))
    if config["tracking"]:
        track(jobs, [its.folder / "report.html"], "sweep", {"sweep": its.folder.name})


def write(folder: Path, template: str, facts: dict[str, object]) -> None:
    """Write report.html of a folder, and say where."""
    refuse_unwritable(folder)
    write_whole(folder / "report.html", render(template, facts))
    print(f"Report: {folder / 'report.html'}")
