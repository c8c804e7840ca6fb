"""`task=report`: everything there is to say about a run or a sweep in one HTML file, which needs nothing else and no network.

The file is put together from what is in the folder: it can be made at any time, also of a run that goes on or failed.
"""

from pathlib import Path

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.sweeps.sweep import Sweep, log_artifacts_of_jobs
from hjepa.tasks.report.html import render
from hjepa.tasks.report.run_page import run_facts
from hjepa.tasks.report.sweep_page import sweep_facts
from hjepa.tasks.trained_run import run_folder
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import check_writable
from hjepa.tracking.tracker import Artifacts, log_artifacts


def write_report(config: Config, path: Path, sweep: str | None) -> None:
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
        write(folder, "run.html", run_facts(folder))
        log_artifacts(config, folder, Artifacts([folder / "report.html"], "report"))
        return
    its = Sweep(Path(sweep).expanduser().absolute())
    jobs = its.read()
    its.refresh(jobs)
    write(its.folder, "sweep.html", sweep_facts(its.folder, jobs))
    if config["tracking"]:
        log_artifacts_of_jobs(jobs, [its.folder / "report.html"], "sweep", {"sweep": its.folder.name})


def write(folder: Path, template: str, facts: dict[str, object]) -> None:
    """Write report.html of a folder, and say where."""
    check_writable(folder)
    atomic_write(folder / "report.html", render(template, facts))
    print(f"Report: {folder / 'report.html'}")
