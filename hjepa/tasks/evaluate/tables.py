"""Tables of an evaluation: a row per source of features and a column per score; over several runs, their means.

The text tables and the report are made from the frames of `result_table`. pandas is imported when a table is made, because it
takes a second to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat
from math import isnan, nan
from typing import TYPE_CHECKING, Any, cast

from hjepa.sweeps.tables import align
from hjepa.tasks.evaluate.protocol import Scores

if TYPE_CHECKING:
    import pandas as pd

Result = dict[str, Any]  # of a protocol, see `hjepa.tasks.evaluate.results`

STD = " std"  # a column "X std" is the standard deviation of the column X


def result_table(protocol: str, result: Result) -> pd.DataFrame:
    """Return the scores of a protocol as text, a row per source of features."""
    rows: dict[tuple[str, ...], dict[str, float]] = {(source,): columns for source, columns in result["rows"].items()}
    return format_rows(rows, ["features"], in_percent(protocol, result))


def runs_table(protocol: str, results: Mapping[str, Result]) -> pd.DataFrame:
    """Return the scores of a protocol for several runs as text: every run, and the mean and standard deviation."""
    rows: dict[tuple[str, ...], Mapping[str, float]] = {}
    for source, columns in aggregate_runs({run: result["rows"] for run, result in results.items()}).items():
        for run, result in results.items():
            rows[source, run] = without_std(result["rows"][source])
        rows[source, "mean"] = columns
    return format_rows(rows, ["features", "run"], in_percent(protocol, next(iter(results.values()))))


def to_text(title: str, table: pd.DataFrame) -> str:
    """Return a title, and a table below it."""
    return f"{title}\n" + "\n".join(f"  {line}" for line in align(table).splitlines())


def in_percent(protocol: str, result: Result) -> bool:
    """Return whether the scores are fractions; results of version 0.1 do not say so."""
    return bool(result.get("percent", protocol != "quality"))


def aggregate_runs(runs: Mapping[str, Scores]) -> Scores:
    """Return the mean and the sample standard deviation (a column "X std") of every score that all runs have."""
    import pandas as pd

    frames = {run: pd.DataFrame(map(without_std, scores.values()), index=list(scores)) for run, scores in runs.items()}
    statistics = pd.concat(frames).groupby(level=1, sort=False).agg(["mean", "std", "count"])
    means: Scores = {}
    for source, row in statistics.iterrows():
        complete = [name for name in row.index.unique(0) if row[name, "count"] == len(runs)]
        columns = {
            key: float(row[name, statistic]) for name in complete for key, statistic in ((name, "mean"), (name + STD, "std"))
        }
        if columns:
            means[str(source)] = columns
    return means


def without_std(columns: Mapping[str, float]) -> dict[str, float]:
    """Return the columns that are not standard deviations."""
    return {name: value for name, value in columns.items() if not name.endswith(STD)}


def format_rows(rows: Mapping[tuple[str, ...], Mapping[str, float]], levels: list[str], percent: bool) -> pd.DataFrame:
    """Return rows of numbers as text; columns named "label/score" become columns "score" with a row per label.

    Args:
        rows: Numbers of every row by column. A row's key has its values of the index levels, first the source of features.
        levels: Names of the index levels.
        percent: Whether the numbers are fractions to show in percent.
    """
    import pandas as pd

    index = pd.MultiIndex.from_tuples([(source.replace("/", ", "), *run) for source, *run in rows], names=levels)
    frame = pd.DataFrame(list(rows.values()), index=index)
    if len(frame.columns) and all("/" in column for column in frame.columns):
        columns = [tuple(column.split("/", 1)) for column in frame.columns]
        frame.columns = pd.MultiIndex.from_tuples(columns, names=["label", None])
        frame = cast("pd.DataFrame", frame.stack("label", future_stack=True))
    cells = {
        name: [format_score(*pair, percent) for pair in zip(frame[name], frame.get(name + STD, repeat(nan)), strict=False)]
        for name in frame.columns
        if not name.endswith(STD)
    }
    return pd.DataFrame(cells, index=frame.index)


def format_score(value: float, std: float, percent: bool) -> str:
    """Format a number and, if it is known, its standard deviation; a missing number is an empty cell."""
    if isnan(value):
        return ""
    form = ".1%" if percent else ".4g"
    return f"{value:{form}}" + ("" if isnan(std) else f" +- {std:{form}}")
