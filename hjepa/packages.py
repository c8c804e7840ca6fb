"""Packages that only some options need: imported on use, and missed before any work."""

from importlib import import_module
from typing import Any

from hjepa.errors import UserError


def require(package: str, option: str, instead: str) -> Any:
    """Import the package that an option needs.

    Raises:
        UserError: it is not installed; the sentence ends with what to do `instead`.
    """
    try:
        return import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"{option} needs the package {name}; pip install {name}, or {instead}.") from None
