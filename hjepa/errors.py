"""The one exception for mistakes a user can mend: Hydra prints its sentence without a stack trace and exits 1."""

from hydra.errors import CompactHydraException


class UserError(CompactHydraException):
    """One clear sentence: the value at fault, what was expected, what to do."""
