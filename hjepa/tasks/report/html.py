"""Rendering of report pages: templates that escape every value, and pictures that are embedded in the page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from hjepa.config.paths import PROGRAM
from hjepa.plotting import CAPTIONS

if TYPE_CHECKING:
    import pandas as pd


class Table(NamedTuple):
    """A table of text.

    Attributes:
        title: Line above the table.
        headings: Headings of the columns.
        rows: Cells.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]

    @classmethod
    def from_frame(cls, title: str, frame: pd.DataFrame) -> Table:
        """Return a data frame of text as a table."""
        frame = frame.reset_index()
        return cls(title, list(frame.columns), frame.to_numpy().tolist())


@dataclass(frozen=True)
class Picture:
    """A PNG file to embed.

    Attributes:
        file: Path of the file, which is named after the picture and, where it has one, its layer.
        note: Sentence to add to the caption.
    """

    file: Path
    note: str = ""

    @property
    def name(self) -> str:
        """Name of the picture without its layer, a key of `hjepa.plotting.CAPTIONS`."""
        return self.file.stem.partition("-")[0]

    @property
    def title(self) -> str:
        """Name of the picture with its layer."""
        return self.file.stem.replace("-", ", ")

    @property
    def caption(self) -> str:
        """Description of the picture."""
        return f"{CAPTIONS.get(self.name, '')} {self.note}".strip()

    @property
    def source(self) -> str:
        """Content of the file as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.file.read_bytes()).decode()}"


def render(template: str, facts: dict[str, Any]) -> str:
    """Render a template of the folder `templates`."""
    templates = Environment(
        loader=PackageLoader("hjepa.tasks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["percent"] = lambda fraction: f"{100 * fraction:.1f} %"
    return templates.get_template(template).render(program=PROGRAM, **facts)
