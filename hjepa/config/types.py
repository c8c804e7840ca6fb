"""Types with bounds for the options of constructors.

A constructor's signature is the schema of its config. Annotating an option with one of these types, as in
`batch_size: PositiveInt` or `flip: Fraction`, makes `hjepa.config.schema` refuse a value out of bounds before anything is
built. At run time they are plain numbers and lists.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


def ascending(bound: float) -> Callable[[list[float]], list[float]]:
    """Return a validator of `[smallest, largest]` pairs in (0, bound]."""

    def validate(pair: list[float]) -> list[float]:
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= bound:
            limit = "" if bound == float("inf") else f" <= {bound:g}"
            raise ValueError(f"expected [smallest, largest] with 0 < smallest <= largest{limit}")
        return pair

    return validate


def decays(betas: list[float]) -> list[float]:
    """Validate the decays of the two moments of Adam."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError("expected [decay of the first moment, decay of the second moment], both from 0 to below 1")
    return betas


def color(channels: list[int]) -> list[int]:
    """Validate the channels of a color."""
    if len(channels) != 3 or not all(0 <= channel <= 255 for channel in channels):
        raise ValueError("expected [red, green, blue] with numbers from 0 to 255")
    return channels


def channels(in_range: Callable[[float], bool], expected: str) -> Callable[[list[float]], list[float]]:
    """Return a validator of one number per color channel."""

    def validate(values: list[float]) -> list[float]:
        if len(values) != 3 or not all(map(in_range, values)):
            raise ValueError(f"expected one number for each of the three channels, {expected}, for pixels from 0 to 1")
        return values

    return validate


def one_number(side: Any) -> Any:
    """Refuse a height and a width where images are squares."""
    if isinstance(side, list | str):
        raise ValueError("images are resized by their shorter side and center-cropped to a square: give its side as one number")
    return side


PositiveRange = Annotated[list[float], AfterValidator(ascending(float("inf")))]
FractionRange = Annotated[list[float], AfterValidator(ascending(1.0))]
BetasFloat = Annotated[list[float], AfterValidator(decays)]
ChannelMeans = Annotated[list[float], AfterValidator(channels(lambda mean: 0 <= mean <= 1, "from 0 to 1"))]
ChannelDeviations = Annotated[list[float], AfterValidator(channels(lambda std: 0 < std <= 1, "above 0 and at most 1"))]
Color = Annotated[list[int], AfterValidator(color)]
SideInt = Annotated[int, BeforeValidator(one_number), Field(gt=0)]
