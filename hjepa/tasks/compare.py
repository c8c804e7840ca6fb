"""`task=compare`: any runs side by side, by the options in which their configs differ.

Runs become the jobs of a sweep that was never started, so that table, plot and differences between runs of the same seed are
those of a sweep.

    table.txt, compare.png, progress.png   for people        compare.json   for machines
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from hjepa.config.errors import UserError
from hjepa.config.identity import BENCHMARK, flatten, identity, short_hash
from hjepa.config.schema import Config
from hjepa.sweeps.job import Job
from hjepa.sweeps.sweep import Sweep, check_metric, log_artifacts_of_jobs
from hjepa.sweeps.tables import columns, default_metric, difference, lookup, members, numbers, options, std, table
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import check_writable, read_config, read_summary

MISSING = object()


def compare_runs(config: Config, path: Path, runs: list[str], sweep: str | None, metric: str | None) -> None:
    """Print, draw and save a comparison, and give it to the runs' trackers.

    Args:
        runs: run folders, or folders of such; sweep: instead, the folder of a sweep.
        metric: dotted key of summary.json to compare by; None takes the linear probe, or the speed of benchmarks.

    Raises:
        UserError: a folder holds no run, fewer than two runs have come to their ends, or they differ in nothing.
    """
    if bool(runs) == bool(sweep):
        raise UserError(
            "task=compare needs what to compare: 'task.runs=[outputs/default/A,outputs/default/B]' or task.sweep=FOLDER."
        )
    jobs, notes = swept(sweep) if sweep else opened(runs)
    for job in jobs:
        add_evaluation(job)
    check_metric(jobs, metric)
    check_enough_runs(jobs)
    name = config["name"] or short_hash([str(job.folder) for job in jobs])
    folder = Path(config["output_root"]).expanduser().absolute() / "comparisons" / name
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = write(folder, jobs, metric or default_metric(jobs), notes)
    if config["tracking"]:
        log_artifacts_of_jobs(jobs, files, "compare", {})
    print(f"Comparison folder: {folder}")


def write(folder: Path, jobs: list[Job], metric: str, notes: list[str]) -> list[Path]:
    """Table, picture and JSON; returns their files."""
    from hjepa.sweeps.plots import plot, plot_progress

    near = Path(os.path.commonpath([job.folder.parent for job in jobs if job.folder]))
    text = "\n".join([table(jobs, metric, f"Comparison of {len(jobs)} runs in {near}", near), *notes])
    print(f"\n{text}", flush=True)
    files = [folder / name for name in ("table.txt", "compare.json", "compare.png")]
    atomic_write(files[0], text + "\n")
    atomic_write(files[1], json.dumps(figures(jobs, metric), indent=2) + "\n")
    plot(jobs, metric, f"Comparison of {len(jobs)} runs", files[2])
    files += plot_progress(jobs, f"Comparison of {len(jobs)} runs", folder / "progress.png")
    print(f"Plots: {', '.join(str(file) for file in files[2:])}")
    return files


# -- which runs ----------------------------------------------------------------------------------------------------------


def swept(folder: str) -> tuple[list[Job], list[str]]:
    """The jobs of a sweep, by what its overrides varied."""
    sweep = Sweep(Path(folder).expanduser().absolute())
    jobs = sweep.read()
    sweep.refresh(jobs)
    return jobs, []


def opened(runs: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Run folders as jobs, by what differs in their configs, and sentences about what differs along with that."""
    folders = list(dict.fromkeys(folder for run in runs for folder in run_folders(run)))
    if len(folders) < 2:
        raise UserError(f"task.runs names one run, {folders[0]}; give at least two to compare.")
    configs = [read_config(folder) for folder in folders]
    timed = [is_benchmark(config) for config in configs]
    if len(set(timed)) > 1:
        one, other = (folders[timed.index(kind)] for kind in (True, False))
        raise UserError(f"task.runs: {one} is a benchmark and {other} is none; compare one kind of runs at a time.")
    overrides, notes = differing([flat_identity(*pair) for pair in zip(folders, configs, strict=True)])
    jobs = [Job(number, own, folder) for number, (folder, own) in enumerate(zip(folders, overrides, strict=True))]
    for job, folder in zip(jobs, folders, strict=True):
        summary = read_summary(folder)
        job.update_from_summary(summary if "status" in summary else {"status": "unfinished"})
    return jobs, notes


def run_folders(run: str) -> list[Path]:
    """The run folder of this path, or all that lie in it: trained runs or, without any, benchmarks."""
    folder = Path(run).expanduser().absolute()
    if (folder / "config.yaml").exists():
        return [folder]
    inside = sorted(file.parent for file in folder.glob("*/config.yaml"))
    if not inside:
        raise UserError(f"task.runs: {folder} is no run folder, and none lies in it (no config.yaml); give those of runs.")
    return [trained for trained in inside if not is_benchmark(read_config(trained))] or inside


def is_benchmark(config: Config) -> bool:
    """Whether a run folder's config is of a benchmark."""
    task = config.get("task")  # nothing is known yet of what is in the folder
    return isinstance(task, dict) and task.get("_target_") == BENCHMARK


def flat_identity(folder: Path, config: Config) -> Config:
    """What can make the results of a run differ, by dotted key."""
    try:
        return {key: value for key, value in flatten(identity(config)).items() if not key.startswith("task.")}
    except (KeyError, TypeError):
        raise UserError(f"{folder}/config.yaml is of another version of hjepa, or was changed; leave this run out.") from None


def differing(configs: Sequence[Config]) -> tuple[list[list[str]], list[str]]:
    """What differs between flat configs, as overrides of each.

    Options of one group that tell the runs apart alike are one: the kind of the part (its `_target_`), or else the one with
    the shortest values, stands for the others; a sentence names those that all runs have.
    """
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key, MISSING) for config in configs]
        pattern = tuple(values.index(value) for value in values)
        if any(pattern):
            alike.setdefault((key.partition(".")[0], pattern), []).append(key)
    if not alike:
        raise UserError("These runs differ in nothing that changes a result; give runs of different options or seeds.")
    chosen: dict[str, list[str]] = {}
    for keys in alike.values():
        lengths = {key: sum(len(str(config.get(key, ""))) for config in configs) for key in keys}
        chosen[min(keys, key=lambda key: (not key.endswith("_target_"), key.count("."), lengths[key]))] = keys
    overrides = [[shown(key, config[key]) for key in chosen if key in config] for config in configs]
    notes = []
    for key, keys in chosen.items():
        along = [k for k in keys if k != key and all(k in config for config in configs)]
        if along:
            notes.append(f"Along with {typed(key)} differ: {', '.join(along)}.")
    return overrides, ["", *notes] if notes else []


def typed(key: str) -> str:
    """An option as it is named: the kind of a part by the part."""
    return key.removesuffix("._target_")


def shown(key: str, value: Any) -> str:
    """An override: the kind of a part by the name of its class."""
    return f"{typed(key)}={str(value).rpartition('.')[2] if key.endswith('_target_') else value}"


def add_evaluation(job: Job) -> None:
    """Put what `task=evaluate` found last, if anything, beside the results of the run: for each protocol, the trained encoder's
    deepest features and the main label.
    """
    evaluation = read_summary(job.folder / "evaluate") if job.folder else {}
    if not evaluation.get("checkpoints"):
        return
    found = {}
    for protocol, result in evaluation["checkpoints"][evaluation["checkpoint"]]["results"].items():
        trained = [columns for source, columns in result["rows"].items() if source.startswith("trained")]
        if trained and trained[-1]:
            found[protocol] = next(iter(trained[-1].values()))
    job.summary = job.summary | {"evaluate": found}


def check_enough_runs(jobs: Sequence[Job]) -> None:
    """Refuse a comparison of runs that have not come to their ends."""
    whole = [job for job in jobs if job.is_complete]
    if len(whole) < 2:
        others = ", ".join(f"{job.folder or f'job {job.number}'} ({job.state})" for job in jobs if not job.is_complete)
        raise UserError(
            f"{len(whole)} of {len(jobs)} runs have come to their ends, and a comparison needs two: {others}; the command that "
            "started a run continues it."
        )


# -- for machines --------------------------------------------------------------------------------------------------------


def figures(jobs: Sequence[Job], metric: str) -> dict[str, Any]:
    """Everything that the table says, as numbers: runs, groups with mean and standard deviation, differences by seed."""
    keys = columns(jobs, metric).values()
    axes, found = members(jobs)
    first = next(iter(found.values()))
    rows = [
        {
            "options": dict(zip(axes, chosen, strict=True)),
            "runs": [job.number for job in runs],
            **{key: {"mean": mean(values), "deviation": std(values)} for key in keys if (values := numbers(runs, key))},
            "difference": {key: d._asdict() for key in keys if runs is not first and (d := difference(first, runs, key))},
        }
        for chosen, runs in found.items()
    ]
    runs = [
        {
            "number": job.number,
            "folder": str(job.folder),
            "options": options(job),
            "state": job.state,
            **{key: value for key in keys if (value := lookup(job.summary, key)) is not None},
        }
        for job in jobs
    ]
    return {"metric": metric, "runs": runs, "groups": rows}
