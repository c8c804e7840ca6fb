"""HTML from facts: templates in which everything is escaped, and pictures that are part of the page."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from hjepa.plotting import CAPTIONS


class Table(NamedTuple):
    """A table as people read it; the first cell of a row is its head."""

    title: str
    heads: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file on the page."""

    file: Path

    @property
    def title(self) -> str:
        """What the picture is called: pca, or attention of a layer."""
        return self.file.stem.replace("-", ", ")

    @property
    def caption(self) -> str:
        """What kind of picture it is, in a sentence."""
        return CAPTIONS.get(self.file.stem.partition("-")[0], "")

    @property
    def source(self) -> str:
        """The whole file as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.file.read_bytes()).decode()}"


def render(template: str, facts: dict[str, Any]) -> str:
    """A page of facts."""
    templates = Environment(
        loader=PackageLoader("hjepa.tasks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": lambda share: f"{100 * share:.1f} %", "spaced": lambda number: f"{number:,.0f}"}
    return templates.get_template(template).render(facts)


def figure(value: Any) -> str:
    """A value of a JSON file as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def tables(data: Any, title: str = "") -> Iterator[Table]:
    """Every table in the data of a JSON file: lists of records, and records of records, wherever they are."""
    if isinstance(data, list) and data and all(is_record(row) for row in data):
        heads = list(dict.fromkeys(key for row in data for key in row))
        yield Table(title, heads, [[figure(row.get(key)) for key in heads] for row in data])
    elif isinstance(data, dict) and data and all(is_record(row) for row in data.values()):
        heads = list(dict.fromkeys(key for row in data.values() for key in row))
        rows = [[str(name), *(figure(row.get(key)) for key in heads)] for name, row in data.items()]
        yield Table(title, ["", *map(str, heads)], rows)
    elif isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from tables(value, " / ".join(filter(None, [title, str(name)])))


def is_record(value: Any) -> bool:
    """Whether a value is a dict of plain values."""
    return isinstance(value, dict) and bool(value) and not any(isinstance(v, dict | list) for v in value.values())
