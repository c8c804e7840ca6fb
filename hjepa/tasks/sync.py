"""`task=sync run=...`: send runs to trackers from what they left in their folders, for a server that was away or is new.

What a tracker has already it does not get again, so the command can be repeated.
"""

from pathlib import Path

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.tracking.resend import send
from hjepa.tracking.run_folder import runs_below


def sync_runs(config: Config, path: Path) -> None:
    """Send the run folder that `run` names, or every one below it, to the trackers of this config.

    Raises:
        UserError: there is no run, nothing to send to, or a tracker could not be reached.
    """
    if not config["run"]:
        raise UserError("task=sync needs a run folder, or a folder of such: run=outputs/default/NAME.")
    if not config["tracking"]:
        raise UserError("task=sync with tracking=none has nothing to send to; choose trackers, as in tracking=mlflow.")
    root = Path(config["run"]).expanduser().absolute()
    folders = runs_below(root)
    if not folders:
        raise UserError(f"run={root} holds no run (no metrics.jsonl in it or below it); give the folder of a run.")
    failed = [str(folder) for folder in folders if not send(config, folder)]
    if failed:
        raise UserError(f"{len(failed)} of {len(folders)} runs could not be sent: {', '.join(failed)}; see the warnings above.")
