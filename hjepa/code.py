"""Which code runs: its commit and what was changed since. It tells whether the code changed while a job waited in a queue."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path


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
