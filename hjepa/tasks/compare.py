"""`task=compare`: compare any runs by the options in which their configs differ.

The runs are treated as the jobs of a sweep, so that the table, the plots and the differences between runs of the same seed are
those of a sweep.

    table.txt, compare.png, progress.png   for people
    compare.json                           for programs
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hjepa.config.errors import UserError
from hjepa.config.identity import flatten, identity, is_benchmark, short_hash
from hjepa.config.schema import Config
from hjepa.sweeps.job import Job
from hjepa.sweeps.sweep import Sweep, check_metric, log_artifacts_of_jobs
from hjepa.sweeps.tables import Comparison, default_metric, lookup, options
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import Record, check_writable, read_config, read_records, read_summary

MISSING = object()

DEFAULT_COLUMNS = {"evaluate.quality": "evaluate.quality.rankme"}  # task.metric that stands for several columns -> one of them


@dataclass(frozen=True)
class Evaluation:
    """The result of a run by one protocol of `task=evaluate`.

    Attributes:
        about: The title of its table, which names the images.
        checkpoint: What the evaluated checkpoint is now: the best one, the latest one, both, or that of an earlier step.
        score: The score on the main label; of `quality`, the scores by column.
    """

    about: str
    checkpoint: frozenset[str]
    score: float | dict[str, float]

    def describe(self) -> str:
        """Return what was evaluated in words."""
        return f"{self.about}, at {' and '.join(sorted(self.checkpoint))}"


def compare_runs(config: Config, path: Path, runs: list[str], sweep: str | None, metric: str | None) -> None:
    """Print, plot and save a comparison, and log it to the trackers of the runs.

    Args:
        config: The resolved config.
        path: Unused; a comparison makes no run.
        runs: Run folders, or folders that contain run folders.
        sweep: Sweep folder, instead of runs.
        metric: Dotted key of summary.json to compare by. None: the linear probe, or the speed of benchmarks.

    Raises:
        UserError: A folder contains no run, fewer than two runs are complete, or the runs do not differ.
    """
    if runs and sweep:
        raise UserError("task=compare compares either task.runs or the runs of task.sweep, and both are set; leave one out.")
    if not runs and not sweep:
        raise UserError(
            "task=compare needs what to compare: 'task.runs=[outputs/default/A,outputs/default/B]' or task.sweep=FOLDER."
        )
    jobs, notes = jobs_of_sweep(sweep) if sweep else jobs_of_runs(runs)
    left_out = add_evaluations(jobs)
    metric = DEFAULT_COLUMNS.get(metric or "", metric)
    check_comparable(left_out, metric)
    check_metric(jobs, metric)
    check_enough_runs(jobs)
    name = config["name"] or short_hash([str(job.folder) for job in jobs])  # `run_path` has checked the name
    folder = Path(config["output_root"]).expanduser().absolute() / "comparisons" / name
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if left_out:
        notes = [*(notes or [""]), *(f"{key} is left out: {reason}." for key, reason in left_out.items())]
    files = save_comparison(folder, jobs, metric or default_metric(jobs), notes)
    if config["tracking"]:
        log_artifacts_of_jobs(jobs, files, "compare", {}, config)
    print(f"Comparison folder: {folder}")


def save_comparison(folder: Path, jobs: list[Job], metric: str, notes: list[str]) -> list[Path]:
    """Print and save the table, the plots and the JSON file; return their paths."""
    comparison = Comparison(jobs, metric)
    root = Path(os.path.commonpath([job.folder.parent for job in jobs if job.folder]))
    text = "\n".join([comparison.to_text(f"Comparison of {len(jobs)} runs in {root}", root), *notes])
    print(f"\n{text}", flush=True)
    files = [folder / "table.txt", folder / "compare.json"]
    atomic_write(files[0], text + "\n")
    atomic_write(files[1], json.dumps(comparison_data(comparison), indent=2) + "\n")
    if comparison.values(metric):
        from hjepa.sweeps.plots import save_plots

        files += save_plots(comparison, f"Comparison of {len(jobs)} runs", folder / "compare.png")
    return files


# -- the runs --------------------------------------------------------------------------------------------------------------


def jobs_of_sweep(folder: str) -> tuple[list[Job], list[str]]:
    """Return the jobs of a sweep, which differ in their overrides."""
    sweep = Sweep(Path(folder).expanduser().absolute())
    jobs = sweep.load()
    if not any(job.folder for job in jobs):
        raise UserError(
            f"task.sweep={folder}: its jobs have no run folders to compare, because their task makes no runs; list the runs that "
            "they read in task.runs."
        )
    sweep.refresh(jobs)
    return jobs, []


def jobs_of_runs(runs: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Return run folders as jobs whose overrides are the differences of their configs, and notes on these differences."""
    folders = list(dict.fromkeys(folder for run in runs for folder in run_folders(run)))
    if len(folders) < 2:
        raise UserError(f"task.runs names one run, {folders[0]}; list at least two to compare.")
    configs = [read_config(folder) for folder in folders]
    benchmarks = [is_benchmark(config) for config in configs]
    if len(set(benchmarks)) > 1:
        one, other = (folders[benchmarks.index(kind)] for kind in (True, False))
        raise UserError(f"task.runs: {one} is a benchmark and {other} is none; compare one kind of runs at a time.")
    overrides, notes = differing_options([flat_identity(*pair) for pair in zip(folders, configs, strict=True)])
    jobs = [Job(number, own, folder) for number, (folder, own) in enumerate(zip(folders, overrides, strict=True))]
    for job, folder in zip(jobs, folders, strict=True):
        summary = read_summary(folder)
        job.update_from_summary(summary if "status" in summary else {"status": "unfinished"})
    return jobs, notes


def run_folders(run: str) -> list[Path]:
    """Return the run folder at a path or all run folders in it: trained runs or, without any, benchmarks."""
    folder = Path(run).expanduser().absolute()
    if (folder / "config.yaml").exists():
        return [folder]
    children = sorted(file.parent for file in folder.glob("*/config.yaml"))
    if not children:
        raise UserError(f"task.runs: {folder} is no run folder and contains none (no config.yaml); list run folders.")
    return [child for child in children if not is_benchmark(read_config(child))] or children


def flat_identity(folder: Path, config: Config) -> Config:
    """Return the options that can change the results of a run, by dotted key."""
    try:
        return {key: value for key, value in flatten(identity(config)).items() if not key.startswith("task.")}
    except (KeyError, TypeError):
        raise UserError(f"{folder}/config.yaml is of another version of hjepa, or was changed; leave this run out.") from None


def differing_options(configs: Sequence[Config]) -> tuple[list[list[str]], list[str]]:
    """Return what differs between flat configs as overrides of each, and notes on options that are left out.

    If several options of one group distinguish the runs in the same way, only one is reported: the class (`_target_`) or else
    the option with the shortest values. A note lists the others, as far as all runs have them.
    """
    equivalent: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key, MISSING) for config in configs]
        pattern = tuple(values.index(value) for value in values)
        if any(pattern):
            equivalent.setdefault((key.partition(".")[0], pattern), []).append(key)
    if not equivalent:
        raise UserError("These runs do not differ in any option that changes a result; list runs of different options or seeds.")
    reported: dict[str, list[str]] = {}
    for keys in equivalent.values():
        lengths = {key: sum(len(str(config.get(key, ""))) for config in configs) for key in keys}
        reported[min(keys, key=lambda key: (not key.endswith("_target_"), key.count("."), lengths[key]))] = keys
    overrides = [[format_override(key, config[key]) for key in reported if key in config] for config in configs]
    notes = []
    for key, keys in reported.items():
        others = [k for k in keys if k != key and all(k in config for config in configs)]
        if others:
            notes.append(f"Along with {key.removesuffix('._target_')} differ: {', '.join(others)}.")
    return overrides, ["", *notes] if notes else []


def format_override(key: str, value: Any) -> str:
    """Format an override; a class is written as `group=ClassName`."""
    if key.endswith("_target_"):
        value = str(value).rpartition(".")[2]
    return f"{key.removesuffix('._target_')}={value}"


def check_enough_runs(jobs: Sequence[Job]) -> None:
    """Raise a UserError unless at least two runs are complete."""
    count = sum(job.is_complete for job in jobs)
    if count < 2:
        others = ", ".join(f"{job.folder or f'job {job.number}'} ({job.state})" for job in jobs if not job.is_complete)
        raise UserError(
            f"{count} of {len(jobs)} runs are complete, and a comparison needs two: {others}; run the command that started a run "
            "again to continue it."
        )


# -- the evaluations of the runs -------------------------------------------------------------------------------------------


def add_evaluations(jobs: Sequence[Job]) -> dict[str, str]:
    """Add the last results of `task=evaluate`, if any, to the summaries of complete jobs.

    The results of a protocol are left out if the runs were evaluated on different images, with different options, or at
    checkpoints that do not correspond to one another.

    Returns:
        Keys of the results that are left out, such as evaluate.linear, with the reason.
    """
    evaluations = {job.number: read_evaluations(job) for job in jobs}
    left_out = {}
    for protocol in dict.fromkeys(protocol for results in evaluations.values() for protocol in results):
        evaluated = [(job, results[protocol]) for job in jobs if protocol in (results := evaluations[job.number])]
        if are_comparable([evaluation for _, evaluation in evaluated]):
            for job, evaluation in evaluated:
                job.summary = job.summary | {"evaluate": job.summary.get("evaluate", {}) | {protocol: evaluation.score}}
        else:
            left_out[f"evaluate.{protocol}"] = describe_differences(evaluated)
    return left_out


def read_evaluations(job: Job) -> dict[str, Evaluation]:
    """Return the last results of `task=evaluate` of a complete job by protocol; empty if there are none.

    These are the results of the trained encoder's deepest features.
    """
    summary = read_summary(job.folder / "evaluate") if job.folder and job.is_complete else {}
    if not job.folder or not summary.get("checkpoints"):
        return {}
    evaluated = summary["checkpoints"][summary["checkpoint"]]
    checkpoint = describe_checkpoint(job.folder, job.summary, evaluated["step"])
    evaluations = {}
    for protocol, result in evaluated["results"].items():
        trained = [columns for source, columns in result["rows"].items() if source.startswith("trained")]
        if trained and trained[0]:  # the features that the run uses come first
            score = trained[0] if protocol == "quality" else next(iter(trained[0].values()))
            evaluations[protocol] = Evaluation(result["about"], checkpoint, score)
    return evaluations


def describe_checkpoint(folder: Path, summary: Record, step: int) -> frozenset[str]:
    """Return what the checkpoint of a step is now, which changes when the run is trained on; see `Evaluation`."""
    probed = [record for record in read_records(folder) if "probe/linear" in record and record["step"]]
    best = max(probed, key=lambda record: (round(record["probe/linear"], 4), -record["step"]), default={})  # as best.pt is chosen
    steps = {"the best checkpoint": best.get("step"), "the latest checkpoint": summary.get("steps")}
    return frozenset(name for name, own in steps.items() if own == step) or frozenset({f"the checkpoint of step {step}"})


def are_comparable(evaluations: Sequence[Evaluation]) -> bool:
    """Return whether the same was evaluated in all runs."""
    same_checkpoint = frozenset.intersection(*(evaluation.checkpoint for evaluation in evaluations))
    return bool(same_checkpoint) and len({evaluation.about for evaluation in evaluations}) == 1


def describe_differences(evaluated: Sequence[tuple[Job, Evaluation]]) -> str:
    """Return in words which runs were evaluated in which way, without a period."""
    names: dict[str, list[str]] = {}
    for job, evaluation in evaluated:
        names.setdefault(evaluation.describe(), []).append(job.folder.name if job.folder else str(job.number))
    ways = "; ".join(f"{', '.join(runs)}: {description}" for description, runs in names.items())
    return f"the runs were not evaluated in the same way ({ways}); evaluate them with the same options"


def check_comparable(left_out: dict[str, str], metric: str | None) -> None:
    """Raise a UserError if the results of the metric are left out."""
    reason = left_out.get(".".join((metric or "").split(".")[:2]))
    if reason:
        raise UserError(f"task.metric={metric}: {reason}.")


# -- compare.json ----------------------------------------------------------------------------------------------------------


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """Return the numbers of the table: runs, groups with mean and standard deviation, and differences between same seeds."""
    keys = list(comparison.columns.values())
    means = comparison.means()
    differences = comparison.differences()
    groups: list[dict[str, Any]] = [
        {"options": dict(zip(comparison.options, group, strict=False)), "runs": [job.number for job in jobs]}
        for group, jobs in comparison.groups.items()
    ]
    for number, group in enumerate(groups):
        for key in keys:
            mean, std, count = means[key].iloc[number]
            if count:
                group[key] = {"mean": mean, "deviation": std if count > 1 else 0.0}
        group["difference"] = {}
        for key in keys if number else ():
            mean, error, pairs = differences[key].iloc[number - 1]
            if pairs:
                group["difference"][key] = {"mean": mean, "error": error if pairs > 1 else None, "pairs": int(pairs)}
    runs = [
        {
            "number": job.number,
            "folder": str(job.folder),
            "options": options(job),
            "state": job.state,
            **{key: value for key in keys if (value := lookup(job.summary, key)) is not None},
        }
        for job in comparison.jobs
    ]
    return {"metric": comparison.metric, "runs": runs, "groups": groups}
