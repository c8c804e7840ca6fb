"""`task=report`: a report on a run or a sweep as one self-contained HTML file, which can be read without a network.

The report is made from the contents of the folder alone, so it can be made at any time, also for a run that is still going on
or has failed.
"""

from pathlib import Path
from typing import Any

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
    """Write the report on a run or a sweep to report.html in its folder, and log it to the trackers.

    Args:
        config: Resolved config, whose `run` names the run folder.
        path: Not used.
        sweep: Folder of a sweep, instead of `run`.

    Raises:
        UserError: If neither or both are set, or the folder is not that of a run or a sweep.
    """
    if (config["run"] is None) == (sweep is None):
        state = "both are set" if sweep else "neither is set"
        raise UserError(f"task=report needs run=outputs/default/NAME or task.sweep=outputs/sweeps/NAME; {state}.")
    if sweep is None:
        folder = run_folder(config)
        write_page(folder, "run.html", run_facts(folder))
        log_artifacts(config, folder, Artifacts([folder / "report.html"], "report"))
        return
    sweep_folder = Sweep(Path(sweep).expanduser().absolute())
    jobs = sweep_folder.load()
    sweep_folder.refresh(jobs)
    folder = sweep_folder.folder
    write_page(folder, "sweep.html", sweep_facts(folder, jobs))
    if config["tracking"]:
        log_artifacts_of_jobs(jobs, [folder / "report.html"], "sweep", {"sweep": folder.name}, config)


def write_page(folder: Path, template: str, facts: dict[str, Any]) -> None:
    """Write report.html of a folder and print its path."""
    check_writable(folder, "make it writable, or copy the folder elsewhere")
    atomic_write(folder / "report.html", render(template, facts))
    print(f"Report: {folder / 'report.html'}")
