"""The one exception for mistakes a user can mend: its sentence is printed without a stack trace, and the exit code is 1."""

from hydra.errors import CompactHydraException


class UserError(CompactHydraException):
    """One clear sentence: the value at fault, what was expected, what to do."""
