"""From a config node to the object that it describes."""

import re
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.config.signatures import import_target
from hjepa.config.targets import iter_targets, validate_targets


def build(node: Config, **arguments: Any) -> Any:
    """Instantiate a config node with `hydra.utils.instantiate`.

    The targets are validated again, because the node may come from a config that was never checked.

    Args:
        node: Plain data with a `_target_`.
        **arguments: Further arguments of the target, passed as they are.

    Raises:
        UserError: A target is not allowed or cannot be imported, or its constructor refuses an option.
    """
    validate_targets(node)
    for _, inner in iter_targets(node):
        import_target(inner["_target_"])
    try:
        if arguments:  # Hydra would take dataclass arguments for configs
            return call(instantiate(node, _partial_=True, _convert_="all"), node["_target_"], arguments)
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def call(partial: Any, target: str, arguments: dict[str, Any]) -> Any:
    """Call a partial constructor; raise `UserError` if an option without a default value is missing."""
    try:
        return partial(**arguments)
    except TypeError as error:
        name = target.rpartition(".")[2]
        if re.match(rf"{name}(\.__init__)?\(\) missing", str(error)):
            raise UserError(f"{target} lacks an option ({error}); add it to the YAML file or the command line.") from None
        raise


def build_or_none(node: Config, **arguments: Any) -> Any:
    """Instantiate a config node, or return None for the option `none` of a group, which has no `_target_`."""
    return build(node, **arguments) if "_target_" in node else None
