"""Which runs an evaluation is about: one run folder, all below a folder, or the runs of a sweep."""

import logging
from pathlib import Path

from hjepa.errors import UserError
from hjepa.folder import runs_below
from hjepa.sweep.sweep import Sweep

log = logging.getLogger(__name__)


def run_folders(run: str | None) -> list[Path]:
    """The folders of the runs that `run` names; those that have no checkpoint are named and left out.

    Raises:
        UserError: there is none with a checkpoint.
    """
    if not run:
        raise UserError("task=evaluate needs a run folder, or a folder of such: run=outputs/default/NAME.")
    root = Path(run).expanduser().absolute()
    if (root / "config.yaml").exists():
        return [root]
    folders = [job.folder for job in Sweep(root).read() if job.folder] if (root / "sweep.json").exists() else runs_below(root)
    if not folders:
        raise UserError(f"run={root} is no run folder and holds none; give the folder of a run, of several runs, or of a sweep.")
    whole = [folder for folder in folders if any((folder / "checkpoints").glob("*.pt"))]
    for folder in folders:
        if folder not in whole:
            log.warning("%s has no checkpoint and is left out", folder)
    if not whole:
        raise UserError(f"None of the {len(folders)} runs of run={root} has a checkpoint; let one of them finish first.")
    return whole
