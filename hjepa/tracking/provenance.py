"""Provenance of a run, for its summary and the tags of its trackers: the code, the sweep and the SLURM job."""

import hashlib
import json
import logging
import os
import subprocess
from functools import cache
from pathlib import Path

import hjepa
from hjepa.config.identity import differences
from hjepa.config.paths import INSTALLED

log = logging.getLogger(__name__)

SWEEP_VARIABLE = "HJEPA_SWEEP"  # environment variable with the name of the sweep that a run belongs to

SUBMITTED_VARIABLE = "HJEPA_SUBMITTED"  # environment variable of a submitted job with the state of the code at submission


def provenance_tags() -> dict[str, str]:
    """Return all tags that describe the provenance of this run."""
    sweep = {"sweep": os.environ[SWEEP_VARIABLE]} if SWEEP_VARIABLE in os.environ else {}
    return git_state() | sweep | submission_tags()


@cache
def git_state() -> dict[str, str]:
    """Return the commit of the code, whether it has uncommitted changes, and a hash of these; empty outside a git checkout.

    An installed package has a version instead. Its folder may lie in a checkout of another project.
    """
    if INSTALLED:
        return {"version": hjepa.__version__}

    def git(*command: str) -> bytes:  # changed files may have any encoding
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, check=True).stdout

    try:
        commit, changes = git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return {}
    changes_hash = hashlib.sha256(changes).hexdigest()[:8] if changes else ""
    return {"commit": commit, "dirty": str(bool(changes)), "changes": changes_hash}


def submission_tags() -> dict[str, str]:
    """Return the tags of a submitted job: its id in SLURM, and changes of the code since the submission, which are logged."""
    if SUBMITTED_VARIABLE not in os.environ:
        return {}
    import submitit

    environment = submitit.JobEnvironment()
    tags = {"slurm_job": environment.job_id} if environment.cluster == "slurm" else {}
    changed = "; ".join(differences(json.loads(os.environ[SUBMITTED_VARIABLE]), git_state()))
    if changed:
        log.warning("THE CODE HAS CHANGED since the submission of this job, which runs it as it is now: %s", changed)
        tags["code_changed"] = changed
    return tags
