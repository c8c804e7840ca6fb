"""`task=sync run=...`: send finished runs to trackers, for a server that was unreachable during the run or is new.

Only what a tracker lacks is sent, so the command can be repeated.
"""

import logging
from pathlib import Path

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.tracking.resend import send_run
from hjepa.tracking.run_folder import find_runs

log = logging.getLogger(__name__)


def sync_runs(config: Config, path: Path, experiment: str | None) -> None:
    """Send the run folder that `run` names, or all run folders below it, to the trackers of this config.

    Args:
        config: The resolved config.
        path: Unused; the task makes no run.
        experiment: Name of the experiment that receives the runs. None: that of each run.

    Raises:
        UserError: `run` contains no run, no tracker is configured, or a tracker could not be reached.
    """
    if not config["run"]:
        raise UserError("task=sync needs a run folder, or a folder that contains run folders: run=outputs/default/NAME.")
    if not config["tracking"]:
        raise UserError("task=sync with tracking=none has nothing to send to; choose trackers, as in tracking=mlflow.")
    root = Path(config["run"]).expanduser().absolute()
    folders = find_runs(root)
    if not folders:
        raise UserError(f"run={root} holds no run (no metrics.jsonl in it or below it); set run to the folder of a run.")
    failed = [str(folder) for folder in folders if not send_or_report(config, folder, experiment)]
    if failed:
        raise UserError(f"{len(failed)} of {len(folders)} runs could not be sent: {', '.join(failed)}; see the warnings above.")


def send_or_report(config: Config, folder: Path, experiment: str | None) -> bool:
    """Send a run folder, and return whether everything arrived; a folder that cannot be read or locked is reported."""
    try:
        return send_run(config, folder, experiment)
    except (UserError, OSError) as error:
        log.warning("%s was not sent: %s", folder, error)
        return False
