"""The tables of an evaluation: a row for every source of features, a column for every score; over several runs, their means."""

from collections.abc import Mapping
from statistics import mean

from hjepa.sweeps.tables import aligned, std
from hjepa.tasks.evaluate.protocol import Scores

PLAIN = ("quality",)  # figures that are no shares


def heading(source: str) -> str:
    """trained/block 6 -> trained, block 6."""
    return source.replace("/", ", ")


def figure(value: float, plain: bool) -> str:
    """A number as people read it."""
    return f"{value:.4g}" if plain else f"{value:.1%}"


def cells(columns: Mapping[str, float], plain: bool) -> dict[str, str]:
    """A row's cells by column, a spread beside what it belongs to."""
    return {
        name: figure(value, plain) + (f" +- {figure(columns[f'{name} std'], plain)}" if f"{name} std" in columns else "")
        for name, value in columns.items()
        if not name.endswith(" std")
    }


def table(protocol: str, about: str, rows: Scores) -> str:
    """One protocol of one run as text."""
    return text(about, grid(protocol, rows))


def grid(protocol: str, rows: Scores) -> list[list[str]]:
    """One protocol of one run as cells, the heads first."""
    return laid_out(protocol, {(heading(source),): columns for source, columns in rows.items()}, ["features"])


def table_of_runs(protocol: str, about: str, runs: Mapping[str, Scores]) -> str:
    """One protocol of several runs as text: each, and their mean and standard deviation."""
    rows: dict[tuple[str, ...], Mapping[str, float]] = {}
    for source, columns in over_runs(runs).items():
        for name, found in runs.items():
            rows[heading(source), name] = {k: v for k, v in found[source].items() if not k.endswith(" std")}
        rows[heading(source), "mean"] = columns
    return text(f"{about}; mean and standard deviation over the runs", laid_out(protocol, rows, ["features", "run"]))


def over_runs(runs: Mapping[str, Scores]) -> Scores:
    """Mean and standard deviation (a column "X std") over runs of everything that all of them have."""
    found = list(runs.values())
    result: Scores = {}
    for source, columns in found[0].items():
        if all(source in rows for rows in found):
            names = [name for name in columns if not name.endswith(" std") and all(name in rows[source] for rows in found)]
            values = {name: [rows[source][name] for rows in found] for name in names}
            result[source] = {k: v for name in names for k, v in ((name, mean(values[name])), (f"{name} std", std(values[name])))}
    return result


def laid_out(protocol: str, rows: Mapping[tuple[str, ...], Mapping[str, float]], heads: list[str]) -> list[list[str]]:
    """Heads and rows as cells; columns "label/score" become a row per label."""
    labels = list(dict.fromkeys(name.partition("/")[0] for columns in rows.values() for name in columns if "/" in name))
    if labels:
        rows = {
            (*head, label): {k.removeprefix(f"{label}/"): v for k, v in columns.items() if k.startswith(f"{label}/")}
            for head, columns in rows.items()
            for label in labels
        }
        heads = [*heads, "label"]
    texts = {head: cells(columns, protocol in PLAIN) for head, columns in rows.items()}
    names = list(dict.fromkeys(name for row in texts.values() for name in row))
    return [[*heads, *names], *([*head, *(row.get(name, "") for name in names)] for head, row in texts.items())]


def text(about: str, cells: list[list[str]]) -> str:
    """A title and cells as lines."""
    return "\n".join([about, *(f"  {line}" for line in aligned(cells))])
