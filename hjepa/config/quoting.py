"""Arguments of a command line as Hydra's grammar reads them, and corrections of those that it refuses."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep, ValueType
from hydra.errors import HydraException


def quote(text: str) -> str:
    """Quote a text for Hydra's grammar; backslashes only escape where a quotation mark follows."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def other_forms(argument: str, shell_quote: Callable[[str], str] = repr) -> str:
    """Return how to write values that commas separate as one value, as the end of a sentence; empty for functions.

    Args:
        argument: The argument, such as `seed=0,1` or `seed=range(3)`.
        shell_quote: Quotes an argument for the place where it is typed.
    """
    key, _, value = argument.partition("=")
    override = parse(argument)
    if not override or override.value_type != ValueType.SIMPLE_CHOICE_SWEEP:
        return ""
    return f", or write {shell_quote(f'{key}=[{value}]')} for a list, {shell_quote(f'{key}={quote(value)}')} for a text"


def parse(argument: str) -> Override | None:
    """Return an argument as Hydra reads it, or None if its grammar refuses it."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def correct(argument: str, arguments: Sequence[str] = ()) -> str | None:
    """Return an argument that Hydra refuses in the form that it reads as the same text, quoted for the shell.

    Args:
        argument: The refused argument: `key=value`, or a word that the shell has cut off from the argument before it.
        arguments: All arguments of the command.

    Returns:
        What to type instead, which Hydra reads, or None if that cannot be told.
    """
    whole = argument if "=" in argument else join_words(argument, arguments)
    key, equals, value = whole.partition("=")
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    for candidate in candidates(key, value, is_sweep) if equals else ():
        override = parse(candidate)
        if override and override.key_or_group and (is_sweep or not override.is_sweep_override()):
            return shlex.quote(candidate)
    return None


def candidates(key: str, value: str, is_sweep: bool) -> Iterator[str]:
    """Yield ways to write a value: as it is, as a list of quoted elements, as several quoted texts of a sweep, as one text."""
    yield f"{key}={value}"
    if value.startswith("[") and value.endswith("]"):
        yield f"{key}=[{','.join(quote_element(element) for element in value[1:-1].split(','))}]"
    if value.startswith("{"):  # a dictionary, whose mistake is not a missing quotation mark
        return
    if is_sweep and "," in value:
        yield f"{key}={','.join(quote_element(element) for element in value.split(','))}"
    yield f"{key}={quote(value)}"


def quote_element(text: str) -> str:
    """Return an element of a list as it is if Hydra reads it, and else quoted."""
    element = text.strip()
    return element if element and parse(f"key={element}") else quote(element)


def join_words(word: str, arguments: Sequence[str]) -> str:
    """Return the argument from which the shell has cut off a word at a blank, with all such words; the word if there is none."""
    if word not in arguments:
        return word
    position = first = last = list(arguments).index(word)
    while first > 0 and "=" not in arguments[first]:
        first -= 1
    while last + 1 < len(arguments) and not re.search(r"=|^[-+~]", arguments[last + 1]):
        last += 1
    is_cut_off = "=" in arguments[first] and not any(argument.startswith("-") for argument in arguments[first : position + 1])
    return " ".join(arguments[first : last + 1]) if is_cut_off else word


def find_choice_of_no_option(arguments: Sequence[str], groups: Sequence[str]) -> str | None:
    """Return the first argument whose key is empty, or is a config group and whose value is not the name of an option."""
    for argument in arguments:
        override = parse(argument)
        if override and (key := override.key_or_group) in ("", *groups):
            value = override.value()
            if not key or not isinstance(value, str | list | Sweep):
                return argument
    return None


def as_text(value: Any) -> Any:
    """Return a number or a truth value, or those in a list, as the text that was typed."""
    if isinstance(value, list):
        return [as_text(element) for element in value]
    return (str(value).lower() if isinstance(value, bool) else str(value)) if isinstance(value, bool | int | float) else value


def render(value: Any) -> str:
    """Return a text, or a list of texts, in Hydra's grammar."""
    return f"[{','.join(map(render, value))}]" if isinstance(value, list) else quote(str(value))
