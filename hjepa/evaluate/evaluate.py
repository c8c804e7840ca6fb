"""`task=evaluate run=...`: judge the features of a run, or of several, by the protocols that are asked for.

    run folder ──> checkpoint ──> features of all depths ──> protocols ──> tables, evaluate/summary.json, trackers

Every protocol's result is kept as soon as it is there; what was done with the same checkpoint and options is not done again.
"""

import logging
from pathlib import Path
from statistics import mean
from typing import Literal

from hjepa.config import Config, build_or_none
from hjepa.data.dataset import Dataset
from hjepa.errors import UserError
from hjepa.evaluate.dense import Dense
from hjepa.evaluate.features import Data, Features
from hjepa.evaluate.fewshot import Fewshot
from hjepa.evaluate.finetune import Finetune
from hjepa.evaluate.probing import KNN, Linear
from hjepa.evaluate.quality import Quality
from hjepa.evaluate.results import Results
from hjepa.evaluate.runs import run_folders
from hjepa.evaluate.seeds import compare
from hjepa.evaluate.study import Judge, Study
from hjepa.evaluate.transfer import Transfer
from hjepa.folder import refuse_unwritable, unheld
from hjepa.opened import Opened, open_run
from hjepa.probes import Probe
from hjepa.tracking.trackers import build_trackers

log = logging.getLogger(__name__)


def evaluate(
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
    transfer: Dataset | None,
    linear: Linear,
    knn: KNN,
    fewshot: Fewshot,
    finetune: Finetune,
    dense: Dense,
    quality: Quality,
) -> float | None:
    """Evaluate the run that `run` names, every one below it, or those of a sweep.

    Args:
        checkpoint, root: see `open_run`.
        protocols: names, or "all", which leaves out what does not apply.
        split: what is scored on; train_images, test_images: how many labelled images at most, None for all.
        batch_size: images per forward pass, None for that of the run's probe.
        depths: of the encoder whose features are judged, None for all.
        transfer: the dataset of the protocol of that name; the others: the protocols.

    Returns:
        The linear accuracy of the last depth, the mean over several runs; None without that protocol.
    """
    judges: dict[str, Judge] = {
        "linear": linear,
        "knn": knn,
        "fewshot": fewshot,
        "finetune": finetune,
        "dense": dense,
        "transfer": Transfer(transfer, config["task"]["transfer"], linear, knn),
        "quality": quality,
    }
    chosen = choose(protocols, judges)
    for name, count in (("train_images", train_images), ("test_images", test_images), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise UserError(f"task.{name}={count}: expected at least 1, or null.")
    found: dict[Path, Results] = {}
    for folder in (folders := run_folders(config["run"])):
        run = open_run(config | {"run": str(folder)}, checkpoint, root)
        probe: Probe | None = build_or_none(run.config["probe"]) or build_or_none(config["probe"])
        if probe is None:
            raise UserError(f"{folder} was trained without probes and none is chosen now; leave probe=none out.")
        data = Data(run.dataset, run.config["dataset"], split, train_images, test_images)
        place = working_folder(folder)
        features = Features(run, data, place / "features", whole_depths(depths, run), batch_size or probe.batch_size)
        with unheld(place) as free:
            if not free:
                raise UserError(f"Another process is evaluating {folder}; wait for it.")
            found[folder] = judge(config, Study(run, data, features, probe), judges, chosen, skip=protocols == "all")
    if len(folders) > 1:
        compare(Path(config["run"]).expanduser().absolute(), found)
    scores = [score for results in found.values() if (score := results.score()) is not None]
    return mean(scores) if scores else None


def choose(protocols: list[str] | str, judges: dict[str, Judge]) -> list[str]:
    """The names of the protocols asked for, in the order of the tables."""
    names = list(judges) if protocols == "all" else [protocols] if isinstance(protocols, str) else protocols
    unknown = [name for name in names if name not in judges]
    if unknown or not names:
        raise UserError(f"task.protocols={protocols}: expected some of {', '.join(judges)}, or all.")
    return [name for name in judges if name in names]


def whole_depths(depths: list[int] | None, run: Opened) -> list[int]:
    """The depths to judge, ascending."""
    last = run.encoder.depth
    if depths is not None and (not depths or not all(1 <= depth <= last for depth in depths)):
        raise UserError(f"task.depths={depths}: {run.folder.name} has an encoder of {last} blocks; expected some of 1 to {last}.")
    return sorted(set(depths or range(1, last + 1)))


def working_folder(folder: Path) -> Path:
    """evaluate/ in a run's folder, which can be written to."""
    place = folder / "evaluate"
    refuse_unwritable(place)
    place.mkdir(exist_ok=True)
    return place


def judge(config: Config, study: Study, judges: dict[str, Judge], chosen: list[str], skip: bool) -> Results:
    """Do what is missing of the chosen protocols; print, keep and track all.

    Args:
        skip: leave out, and say so, what the run or its data are refused for.
    """
    run, place, task = study.run, study.features.folder.parent, config["task"]
    trackers = build_trackers(config["tracking"])
    results = Results(place, run, anew=config["overwrite"])
    print(f"{run.folder}, checkpoint {run.checkpoint.stem} of step {run.step}", flush=True)
    options = {name: task[name] for name in chosen} | {"transfer": [task[name] for name in ("transfer", "linear", "knn")]}
    missing = [name for name in chosen if not results.has(name, study.key(options[name]))]
    for name in missing:
        try:
            judges[name].refuse(study)
        except UserError as error:
            if not skip:
                raise
            print(f"{name} is left out: {error}")
            chosen = [other for other in chosen if other != name]
    results.ask(chosen)
    for name in chosen:
        if name in missing:
            log.info("%s ...", name)
            results.keep(name, study.key(options[name]), judges[name].about(study), judges[name](study))
        print(f"\n{results.table(name)}", flush=True)
    results.end()
    if results.run_id:
        files = [place / "summary.json", place / "table.txt"]
        trackers.add(results.run_id, {"evaluated": results.hash}, files, "evaluate", results.metrics(), run.step)
    print(f"\nEvaluation: {place}/summary.json and table.txt; features/ beside them can be removed at any time.", flush=True)
    return results
