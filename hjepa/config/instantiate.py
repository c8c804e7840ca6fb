"""The config before any work: is it complete and well-typed, and which run does it name? Imports no torch.

The schema of a config node is the signature of its `_target_`, read from the source: unknown options and wrong types are
found in under a second, and a new class needs no second declaration.
"""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from hjepa.config.errors import UserError
from hjepa.config.schema import Config, validate_targets


def build(node: Config, **more: Any) -> Any:
    """`hydra.utils.instantiate`, with `more` arguments passed as they are and our own sentences let through; refuses what
    `validate_targets` does, as a config need not have been checked.
    """
    validate_targets(node)
    try:
        if more:  # instantiate would take dataclass arguments for configs
            return instantiate(node, _partial_=True, _convert_="all")(**more)
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def build_or_none(node: Config, **more: Any) -> Any:
    """The same, or None where the option is `none`: a node without target, whatever else a recipe has put there."""
    return build(node, **more) if "_target_" in node else None
