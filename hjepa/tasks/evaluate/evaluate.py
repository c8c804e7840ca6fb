"""`task=evaluate run=...`: judge the features of a run, or of several, by the protocols that are asked for.

    run folder ──> checkpoint ──> features of all depths ──> protocols ──> tables, evaluate/summary.json, trackers

Every protocol's result is kept as soon as it is there; what was done with the same checkpoint and options is not done again.
"""

import logging
from pathlib import Path
from statistics import mean
from typing import Literal

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.data.datamodule import DataModule
from hjepa.sweeps.sweep import Sweep
from hjepa.tasks.evaluate.dense import DenseProbe
from hjepa.tasks.evaluate.few_shot import FewShot
from hjepa.tasks.evaluate.finetune import FineTuning
from hjepa.tasks.evaluate.linear_knn import KNNProbe, LinearProbe
from hjepa.tasks.evaluate.protocol import EvalContext, EvalOptions, EvalProtocol
from hjepa.tasks.evaluate.quality import Quality
from hjepa.tasks.evaluate.results import Results
from hjepa.tasks.evaluate.seeds import compare
from hjepa.tasks.evaluate.transfer import Transfer
from hjepa.tracking.run_folder import check_writable, runs_below, try_lock
from hjepa.tracking.tracker import Artifacts, log_artifacts

log = logging.getLogger(__name__)


def evaluate_runs(
    config: Config,
    path: Path,
    checkpoint: str | None,
    root: str | None,
    protocols: list[str] | str,
    split: Literal["test", "validation"],
    train_images: int | None,
    test_images: int | None,
    batch_size: int | None,
    depths: list[int] | None,
    transfer: DataModule | None,
    linear: LinearProbe,
    knn: KNNProbe,
    fewshot: FewShot,
    finetune: FineTuning,
    dense: DenseProbe,
    quality: Quality,
) -> float | None:
    """Evaluate the run that `run` names, every one below it, or those of a sweep.

    Args:
        checkpoint, root: see `load_run`.
        protocols: names, or "all", which leaves out what does not apply.
        split: what is scored on; train_images, test_images: how many labeled images at most, None for all.
        batch_size: images per forward pass, None for that of the run's probe.
        depths: of the encoder whose features are judged, None for all.
        transfer: the dataset of the protocol of that name; the others: the protocols.

    Returns:
        The linear accuracy of the last depth, the mean over several runs; None without that protocol.
    """
    protocols_by_name: dict[str, EvalProtocol] = {
        "linear": linear,
        "knn": knn,
        "fewshot": fewshot,
        "finetune": finetune,
        "dense": dense,
        "transfer": Transfer(transfer, config["task"]["transfer"], linear, knn),
        "quality": quality,
    }
    chosen = choose(protocols, protocols_by_name)
    scope = EvalOptions(checkpoint, root, split, train_images, test_images, batch_size, depths)
    folders = run_folders(config["run"])
    try:
        found = {
            folder: evaluate_run(config, folder, scope, protocols_by_name, chosen, skip=protocols == "all") for folder in folders
        }
    except KeyboardInterrupt:
        raise UserError(
            "Interrupted: the protocols that were finished are kept, and the same command goes on after them."
        ) from None
    if len(folders) > 1:
        compare(Path(config["run"]).expanduser().absolute(), found)
    scores = [score for results in found.values() if (score := results.score()) is not None]
    return mean(scores) if scores else None


def choose(protocols: list[str] | str, protocols_by_name: dict[str, EvalProtocol]) -> list[str]:
    """The names of the protocols asked for, in the order of the tables."""
    names = list(protocols_by_name) if protocols == "all" else [protocols] if isinstance(protocols, str) else protocols
    unknown = [name for name in names if name not in protocols_by_name]
    if unknown or not names:
        raise UserError(f"task.protocols={protocols}: expected some of {', '.join(protocols_by_name)}, or all.")
    return [name for name in protocols_by_name if name in names]


def evaluate_run(
    config: Config, folder: Path, scope: EvalOptions, protocols_by_name: dict[str, EvalProtocol], chosen: list[str], skip: bool
) -> Results:
    """Evaluate one run: open it, do what is missing, print, keep and track all.

    Args:
        skip: leave out, and say so, what the run or its data are refused for.
    """
    place = folder / "evaluate"
    check_writable(place, "make it writable, or copy the run elsewhere")
    study = scope.study(config, folder, place / "features")
    place.mkdir(exist_ok=True)
    with try_lock(place) as free:
        if not free:
            raise UserError(f"Another process is evaluating {folder}; wait for it.")
        results = Results(place, study.run, anew=config["overwrite"])
        print(f"{folder}, checkpoint {study.run.checkpoint.stem} of step {study.run.step}", flush=True)
        judge(config["task"], study, results, protocols_by_name, chosen, skip)
        results.end()
    files = [place / "summary.json", place / "table.txt"]
    log_artifacts(config, folder, Artifacts(files, "evaluate", metrics=results.metrics(), step=study.run.step))
    print(f"\nEvaluation: {place}/summary.json and table.txt; features/ beside them can be removed at any time.", flush=True)
    return results


def judge(
    task: Config, study: EvalContext, results: Results, protocols_by_name: dict[str, EvalProtocol], chosen: list[str], skip: bool
) -> None:
    """Do what is missing of the chosen protocols, and print the tables; everything that can be refused is refused first."""
    options = {name: task[name] for name in chosen} | {"transfer": [task[name] for name in ("transfer", "linear", "knn")]}
    missing = [name for name in chosen if not results.has(name, study.key(options[name]))]
    refused = []
    for name in missing:
        try:
            protocols_by_name[name].check(study)
        except UserError as error:
            if not skip:
                raise
            print(f"{name} is left out: {error}")
            refused.append(name)
    results.ask([name for name in chosen if name not in refused])
    for name in results.protocols:
        if name in missing:
            log.info("%s ...", name)
            results.keep(name, study.key(options[name]), protocols_by_name[name].about(study), protocols_by_name[name](study))
        print(f"\n{results.table(name)}", flush=True)


log = logging.getLogger(__name__)


def run_folders(run: str | None) -> list[Path]:
    """The folders of the runs that `run` names; those that have no checkpoint are named and left out.

    Raises:
        UserError: there is none with a checkpoint.
    """
    if not run:
        raise UserError("task=evaluate needs a run folder, or a folder of such: run=outputs/default/NAME.")
    root = Path(run).expanduser().absolute()
    if (root / "config.yaml").exists():
        return [root]
    folders = [job.folder for job in Sweep(root).read() if job.folder] if (root / "sweep.json").exists() else runs_below(root)
    if not folders:
        raise UserError(f"run={root} is no run folder and holds none; give the folder of a run, of several runs, or of a sweep.")
    whole = [folder for folder in folders if any((folder / "checkpoints").glob("*.pt"))]
    for folder in folders:
        if folder not in whole:
            log.warning("%s has no checkpoint and is left out", folder)
    if not whole:
        raise UserError(f"None of the {len(folders)} runs of run={root} has a checkpoint; let one of them finish first.")
    return whole
