"""Tables of a sweep or a comparison: results of every run, means over seeds, and differences between runs of the same seed.

`Comparison` holds the results in a pandas data frame. The text table, compare.json, the report and the plots are all made from
it. pandas is imported when a comparison is made, because every start of the program imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hjepa.config.identity import flatten
from hjepa.sweeps.job import Job

if TYPE_CHECKING:
    import pandas as pd

RESULTS = {  # column heading -> dotted key of summary.json
    "linear": "probe.linear",
    "untrained": "untrained.linear",
    "knn": "probe.knn",
    "rankme": "probe.rankme",
    "images/s": "images_per_second",
    "evaluated linear": "evaluate.linear",
    "evaluated knn": "evaluate.knn",
    "evaluated rankme": "evaluate.quality.rankme",
    "finetuned": "evaluate.finetune",
    "of matmul rate": "utilization",
    "seconds": "seconds",
    "memory MB": "peak_memory_mb",
}

PERCENT_SUFFIXES = ("linear", "knn", "finetune", "utilization")  # keys that end so hold fractions and are printed in percent

Group = tuple[str, ...]  # values of the varied options


def lookup(summary: dict[str, Any], key: str) -> float | None:
    """Return the number of a summary at a dotted key, or None if it has none."""
    value: Any = summary
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def results(summary: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary that `RESULTS` lists, by column heading."""
    return {heading: value for heading, key in RESULTS.items() if (value := lookup(summary, key)) is not None}


def default_metric(jobs: Sequence[Job]) -> str:
    """Return the key to compare jobs by: the linear probe, or the speed if no job was probed."""
    probed = any(lookup(job.summary, "probe.linear") is not None for job in jobs)
    return "probe.linear" if probed else "images_per_second"


def options(job: Job) -> dict[str, str]:
    """Return the options that a job's overrides set, with their values."""
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in job.overrides)}


def varied(jobs: Sequence[Job]) -> list[str]:
    """Return the options in which the jobs differ."""
    settings = [options(job) for job in jobs]
    return [key for key in dict.fromkeys(k for s in settings for k in s) if len({s.get(key) for s in settings}) > 1]


def label_of(jobs: Sequence[Job], job: Job) -> str:
    """Return the overrides that distinguish a job from the other jobs."""
    settings = options(job)
    return " ".join(f"{key}={settings[key]}" for key in varied(jobs) if key in settings)


def seed_of(job: Job) -> str:
    """Return the seed of a run, from its overrides or else from its summary."""
    return options(job).get("seed") or str(job.summary.get("seed"))


def format_value(value: float | None, key: str) -> str:
    """Format a result for people: fractions in percent."""
    if value is None or isnan(value):  # NaN: missing in a data frame
        return ""
    return f"{value:.1%}" if key.endswith(PERCENT_SUFFIXES) else f"{value:.4g}"


def format_mean(mean: float, std: float, key: str) -> str:
    """Format a mean and, if it is known, the standard deviation."""
    if isnan(std):
        return format_value(mean, key)
    return f"{format_value(mean, key)} +- {std:{'.1%' if key.endswith(PERCENT_SUFFIXES) else '.3g'}}"


def format_difference(mean: float, error: float, key: str) -> str:
    """Format a difference and, if it is known, its standard error; differences of fractions are in percentage points."""
    if isnan(mean):
        return ""
    scale, digits, unit = (100, ".1f", " points") if key.endswith(PERCENT_SUFFIXES) else (1, ".3g", "")
    return f"{scale * mean:+{digits}}" + ("" if isnan(error) else f" +- {scale * error:{digits}}") + unit


class Comparison:
    """Runs side by side, grouped by the options in which they differ; runs of one group differ in their seeds.

    Args:
        jobs: Jobs with their summaries. Only complete ones belong to a group.
        metric: Dotted key of summary.json that becomes a column even if `RESULTS` does not list it.

    Attributes:
        columns: Column headings and keys of summary.json, as far as any job has the result.
        options: Varied options without the seed.
        levels: Names of the pandas index levels that identify a group: the varied options, or `[""]` if there are none.
        groups: Complete jobs by their values of these levels.
        frame: Every number of the summaries: a row per complete job, indexed by group and seed; a column per key.
    """

    def __init__(self, jobs: Sequence[Job], metric: str) -> None:
        import pandas as pd

        self.jobs, self.metric = list(jobs), metric
        listed = RESULTS if metric in RESULTS.values() else RESULTS | {metric: metric}
        self.columns = {h: key for h, key in listed.items() if any(lookup(job.summary, key) is not None for job in jobs)}
        self.options = [key for key in varied(jobs) if key != "seed"]
        self.levels = self.options or [""]
        self.groups: dict[Group, list[Job]] = {}
        for job in jobs:
            if job.is_complete:
                self.groups.setdefault(tuple(options(job).get(key, "") for key in self.levels), []).append(job)
        rows = [(*group, seed_of(job)) for group, members in self.groups.items() for job in members]
        index = pd.MultiIndex.from_frame(pd.DataFrame(rows, columns=[*self.levels, "seed"]))
        complete = [flatten(job.summary) for members in self.groups.values() for job in members]
        numbers = [{key: value for key, value in summary.items() if isinstance(value, int | float)} for summary in complete]
        frame = pd.DataFrame(numbers, index=index, dtype=float)
        self.frame = frame.reindex(columns=[*dict.fromkeys([*frame.columns, *self.columns.values(), metric])])

    def values(self, key: str) -> dict[Group, list[float]]:
        """Return the results of a key of summary.json by group, without groups and runs that lack it."""
        results = {g: [v for job in jobs if (v := lookup(job.summary, key)) is not None] for g, jobs in self.groups.items()}
        return {group: values for group, values in results.items() if values}

    @property
    def has_repeats(self) -> bool:
        """Whether any group has several runs."""
        return any(len(members) > 1 for members in self.groups.values())

    def means(self) -> pd.DataFrame:
        """Return the mean, sample standard deviation (NaN for one run) and count over seeds; a row per group."""
        return self.frame.groupby(level=self.levels, sort=False).agg(["mean", "std", "count"])

    def differences(self) -> pd.DataFrame:
        """Return how every other group differs from the first: the mean, its standard error, and the number of pairs.

        Runs of the same seed are compared, since the effects of the seed alone (order of the data, initial weights) are the
        same in both.
        """
        by_seed = self.frame.groupby(level=[*self.levels, "seed"], sort=False).last()
        first = by_seed.iloc[: len({seed_of(job) for job in next(iter(self.groups.values()))})].droplevel([*self.levels])
        differences = by_seed - first.reindex(by_seed.index.get_level_values("seed")).to_numpy()
        return differences.iloc[len(first) :].groupby(level=self.levels, sort=False).agg(["mean", "sem", "count"])

    def job_table(self) -> pd.DataFrame:
        """Return a row per job as text: options, state and results."""
        import pandas as pd

        keys = varied(self.jobs)
        rows = [
            {"job": str(job.number), **{key: options(job).get(key, "") for key in keys}, "state": job.state}
            | {heading: format_value(lookup(job.summary, key), key) for heading, key in self.columns.items()}
            for job in self.jobs
        ]
        return pd.DataFrame(rows).set_index(["job", *keys])

    def mean_table(self) -> pd.DataFrame:
        """Return a row per group as text: options, mean and standard deviation of every result, and the number of runs."""
        table = format_columns(self.means(), self.columns, "std", format_mean)
        return table.assign(runs=[str(len(members)) for members in self.groups.values()])

    def difference_table(self) -> pd.DataFrame:
        """Return a row per group but the first as text: options, differences from the first, and the number of pairs."""
        differences = self.differences()
        table = format_columns(differences, self.columns, "sem", format_difference)
        counts = differences[[(key, "count") for key in self.columns.values()]].to_numpy()
        return table.assign(pairs=[f"{max(row, default=0):.0f}" for row in counts])

    def to_text(self, title: str, folder: Path) -> str:
        """Return all tables as text; logs or, without any, runs are named relative to the folder."""
        location = "log" if any(job.log for job in self.jobs) else "run"
        paths = [job.log if location == "log" else job.folder for job in self.jobs]
        names = [str(path.relative_to(folder) if path and path.is_relative_to(folder) else path or "") for path in paths]
        reasons = [job.reason.splitlines()[0] if job.reason else "" for job in self.jobs]
        width = max(map(len, reasons))
        jobs = self.job_table().assign(**{location: names, "": [reason.ljust(width) for reason in reasons]})
        blocks = [f"{title}:\n{align(jobs)}"]
        if self.has_repeats:
            blocks.append(f"Mean and standard deviation over seeds:\n{align(self.mean_table())}")
        return "\n\n".join([*blocks, *self.difference_text()])

    def difference_text(self) -> list[str]:
        """Return the block of differences; empty if there are no pairs, or if more than two groups have one seed each."""
        if len(self.groups) < 2:
            return []
        table, first = self.difference_table(), next(iter(self.groups))
        pairs = table["pairs"].astype(int).max()
        if pairs == 0 or (pairs == 1 and len(self.groups) > 2):
            return []
        named = ", ".join(f"{key}={value or '(none)'}" for key, value in zip(self.levels, first, strict=True))
        reference = named if len(self.levels) <= 3 else f"the group of job {self.groups[first][0].number}"
        text = f"Difference from {reference} between runs of the same seed (mean and its standard error):\n{align(table)}"
        if pairs == 1 and any(key.startswith("probe.") for key in self.columns.values()):
            text += "\nOne seed proves nothing: runs that differ only in the seed differ as well. Sweep seed=0,1,2 of both."
        return [text]


def format_columns(
    statistics: pd.DataFrame, columns: dict[str, str], error: str, form: Callable[[float, float, str], str]
) -> pd.DataFrame:
    """Return a table of text from the mean and the `error` statistic of every column."""
    import pandas as pd

    pairs = {heading: statistics[key][["mean", error]].to_numpy() for heading, key in columns.items()}
    cells = {heading: [form(mean, spread, columns[heading]) for mean, spread in rows] for heading, rows in pairs.items()}
    return pd.DataFrame(cells, index=statistics.index)


def align(table: pd.DataFrame) -> str:
    """Return a table as lines without trailing spaces."""
    return "\n".join(line.rstrip() for line in table.to_string(sparsify=False).splitlines())
