"""Locations of the configuration files, and of the folder that holds outputs/ and data/.

In a checkout, conf/ and sweeps/ are top-level folders; in an installed package they lie in `hjepa/_files`. The YAML files
refer to both locations by environment variables: `HJEPA_ROOT` is the folder that holds conf/ and sweeps/, and `HJEPA_HOME` is
the folder in which outputs/ and data/ are created.
"""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

INSTALLED = (PACKAGE / "_files").is_dir()  # from a wheel, not from a checkout

FILES = PACKAGE / "_files" if INSTALLED else PACKAGE.parent

CONF = FILES / "conf"

PROGRAM = "hjepa" if INSTALLED else "python launch.py"  # the command that messages recommend


def path_variables(home: Path | None = None) -> dict[str, str]:
    """Return the environment variables that the YAML files refer to.

    Args:
        home: Folder of outputs/ and data/ if `HJEPA_HOME` is not set. None: the current folder.
    """
    return {"HJEPA_ROOT": str(FILES), "HJEPA_HOME": os.environ.get("HJEPA_HOME") or str(home or Path.cwd())}
