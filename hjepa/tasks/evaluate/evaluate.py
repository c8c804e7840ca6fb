"""`task=evaluate run=...`: evaluate the features of a run, or of several runs, by the protocols of `protocol=[...]`.

    run folder ──> checkpoint ──> features of all layers ──> protocols ──> tables, evaluate/summary.json, trackers

The scores of a protocol are stored as soon as they are computed, and are not computed again for the same checkpoint and options.
"""

import logging
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Literal

from hjepa.config.errors import NotApplicable, UserError
from hjepa.config.instantiate import build
from hjepa.config.schema import Config
from hjepa.config.types import PositiveInt
from hjepa.sweeps.sweep import Sweep
from hjepa.tasks.evaluate.protocol import EvalContext, EvalOptions, EvalProtocol
from hjepa.tasks.evaluate.results import Results, aggregate_seeds
from hjepa.tasks.trained_run import TrainedRun
from hjepa.tracking.run_folder import check_writable, find_runs, try_lock
from hjepa.tracking.tracker import Artifacts, log_artifacts

log = logging.getLogger(__name__)


def evaluate_runs(
    config: Config,
    path: Path,
    checkpoint: str | None,
    root: str | None,
    split: Literal["test", "validation"],
    train_images: PositiveInt | None,
    test_images: PositiveInt | None,
    batch_size: PositiveInt | None,
    depths: list[PositiveInt] | None,
) -> float | None:
    """Evaluate the run that `run` names, every run below that folder, or the runs of a sweep.

    Args:
        config: Config of the command. Its `protocol` maps the names of the chosen protocols to their configs.
        path: Not used.
        checkpoint: See `hjepa.tasks.trained_run.load_run`.
        root: See `hjepa.tasks.trained_run.load_run`.
        split: Split to score on.
        train_images: Largest number of labeled images to fit to, None for all.
        test_images: Largest number of labeled images to score on, None for all.
        batch_size: Number of images per forward pass, None for that of the run's probe.
        depths: Numbers of the encoder's layers (blocks or stages) whose features are evaluated, None for all.

    Returns:
        The linear accuracy of the features, averaged over the runs, or None if the linear probe was not computed.

    Raises:
        UserError: The only run cannot be evaluated or, after all others were evaluated, one of several runs.
    """
    nodes = dict(config.get("protocol") or {})
    skip_inapplicable = nodes.pop("skip_inapplicable", False)
    if not nodes:
        raise UserError("protocol=[] contains no protocol; choose some of the files in conf/protocol/, or protocol=all.")
    protocols: dict[str, EvalProtocol] = {name: build(node) for name, node in nodes.items()}
    options = EvalOptions(checkpoint, root, split, train_images, test_images, batch_size, depths)
    folders = find_evaluable_runs(config["run"])
    evaluate = evaluate_run if len(folders) == 1 else evaluate_or_report
    try:
        every = {folder: evaluate(config, folder, options, protocols, skip_inapplicable) for folder in folders}
    except KeyboardInterrupt:
        raise UserError(
            "Interrupted: the protocols that were finished are stored; the same command continues with the others"
            f"{' if you leave out overwrite=true, which deletes them' if config['overwrite'] else ''}."
        ) from None
    results = {folder: result for folder, result in every.items() if result}
    if len(folders) > 1:
        aggregate_seeds(Path(config["run"]).expanduser().absolute(), results)
    if failed := [str(folder) for folder in folders if folder not in results]:
        raise UserError(
            f"{len(failed)} of {len(folders)} runs could not be evaluated: {', '.join(failed)}; see the warnings above."
        )
    accuracies = [accuracy for result in results.values() if (accuracy := result.linear_accuracy()) is not None]
    return mean(accuracies) if accuracies else None


def evaluate_or_report(
    config: Config, folder: Path, options: EvalOptions, protocols: dict[str, EvalProtocol], skip_inapplicable: bool
) -> Results | None:
    """Do what `evaluate_run` does, and return None for a run that cannot be evaluated, after a warning."""
    try:
        return evaluate_run(config, folder, options, protocols, skip_inapplicable)
    except UserError as error:
        log.warning("%s was not evaluated: %s", folder, error)
        return None


def evaluate_run(
    config: Config, folder: Path, options: EvalOptions, protocols: dict[str, EvalProtocol], skip_inapplicable: bool
) -> Results:
    """Evaluate one run: compute what is missing, print the tables, and log everything to the trackers.

    Args:
        config: Config of the command.
        folder: Run folder.
        options: Options that all protocols share.
        protocols: Protocols by name.
        skip_inapplicable: Leave out protocols that cannot evaluate this run, instead of raising their `NotApplicable`.
    """
    output = folder / "evaluate"
    check_writable(output, "make it writable, or copy the run elsewhere")
    context = options.load_context(config, folder, output / "features")
    contexts = {name: replace(context, options=config["protocol"][name]) for name in protocols}
    output.mkdir(exist_ok=True)
    with try_lock(output) as locked:
        if not locked:
            raise UserError(f"Another process is evaluating {folder}; wait for it.")
        results = Results(output, context.run)
        print(f"{folder}, checkpoint {context.run.checkpoint.stem} of step {context.run.step}", flush=True)
        print(explain_baselines(context.run), end="", flush=True)
        compute_missing(protocols, contexts, results, skip_inapplicable, config["overwrite"])
        results.finish()
    files = [output / "summary.json", output / "table.txt"]
    log_artifacts(config, folder, Artifacts(files, "evaluate", metrics=results.metrics(), step=context.run.step))
    print(f"\nEvaluation: {output}/summary.json and table.txt; features/ beside them can be removed at any time.", flush=True)
    return results


def explain_baselines(run: TrainedRun) -> str:
    """Return a line about the rows of a run that started from given weights, as training calls them; empty for other runs."""
    if run.initial:
        return 'Rows "initial" are the weights it started from, rows "untrained" a network with random weights.\n'
    if run.started_from_weights:
        return 'Rows "untrained" are a network with random weights; the weights it started from were not kept (no initial.pt).\n'
    return ""


def compute_missing(
    protocols: dict[str, EvalProtocol],
    contexts: dict[str, EvalContext],
    results: Results,
    skip_inapplicable: bool,
    overwrite: bool,
) -> None:
    """Compute the protocols without results and print all tables; every protocol is checked before the first computation.

    With `overwrite`, those with results are computed again.

    Raises:
        UserError: If a protocol cannot evaluate the run or its data or, with `skip_inapplicable`, if none can.
    """
    missing = [name for name in protocols if overwrite or not results.has(name, protocols[name], contexts[name])]
    skipped = []
    for name in missing:
        try:
            protocols[name].check(contexts[name])
        except NotApplicable as error:
            if not skip_inapplicable:
                raise
            print(f"{name} is left out: {error}")
            skipped.append(name)
    if len(skipped) == len(protocols):
        raise UserError("No protocol can evaluate this run, for the reasons above; correct one of them, or choose another run.")
    results.select([name for name in protocols if name not in skipped])
    if overwrite:
        results.discard(results.protocols)
    for name in results.protocols:
        if name in missing:
            log.info("%s ...", name)
            results.add(name, protocols[name], contexts[name])
        print(f"\n{results.table(name)}", flush=True)


def find_evaluable_runs(run: str | None) -> list[Path]:
    """Return the folders of the runs that `run` names; runs without a checkpoint are left out with a warning.

    Raises:
        UserError: If there is no run with a checkpoint.
    """
    if not run:
        raise UserError("task=evaluate needs a run folder, or a folder of runs: run=outputs/default/NAME.")
    root = Path(run).expanduser().absolute()
    if (root / "config.yaml").exists():
        return [root]
    folders = [job.folder for job in Sweep(root).load() if job.folder] if (root / "sweep.json").exists() else find_runs(root)
    if not folders:
        raise UserError(f"run={root} is no run folder and contains none; set it to the folder of a run, several runs or a sweep.")
    evaluable = [folder for folder in folders if any((folder / "checkpoints").glob("*.pt"))]
    for folder in folders:
        if folder not in evaluable:
            log.warning("%s has no checkpoint and is left out", folder)
    if not evaluable:
        raise UserError(f"None of the {len(folders)} runs of run={root} has a checkpoint; let one of them finish first.")
    return evaluable
