"""Where a run comes from, for its summary and its trackers' tags: the code, the sweep and the SLURM job that it is part of."""

import hashlib
import json
import logging
import os
import subprocess
from functools import cache
from pathlib import Path

from hjepa.config.identity import differences

log = logging.getLogger(__name__)

SWEEP = "HJEPA_SWEEP"  # environment variable: the sweep that a run is tagged with

SUBMITTED = "HJEPA_SUBMITTED"  # environment variable of a SLURM job: the code at its submission


def origin() -> dict[str, str]:
    """All tags that tell where a run comes from."""
    return git_state() | ({"sweep": os.environ[SWEEP]} if SWEEP in os.environ else {}) | job_tags()


@cache
def git_state() -> dict[str, str]:
    """Commit of the code, whether it has uncommitted changes, and 8 hexadecimal digits of them; empty outside a git checkout."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return {}
    digits = hashlib.sha256(changes.encode()).hexdigest()[:8] if changes else ""
    return {"commit": commit, "dirty": str(bool(changes)), "changes": digits}


def job_tags() -> dict[str, str]:
    """Tracker's tags of a run under SLURM: its job, and how the code has changed since the submission, which is also said."""
    if SUBMITTED not in os.environ:
        return {}
    import submitit

    tags = {"slurm_job": submitit.JobEnvironment().job_id}
    changed = "; ".join(differences(json.loads(os.environ[SUBMITTED]), git_state()))
    if changed:
        log.warning("THE CODE HAS CHANGED between submission and start of this job, which runs it as it is now: %s", changed)
        tags["code_changed"] = changed
    return tags
