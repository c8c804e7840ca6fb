"""`task=visualize run=...`: pictures of a run, in its folder's `visualize/` and in its trackers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.distributed.seeding import generator
from hjepa.plotting import CAPTIONS, plot_curves, plot_masks
from hjepa.tasks.trained_run import load_run, run_folder
from hjepa.tasks.visualize.attention import draw_attention
from hjepa.tasks.visualize.neighbors import draw_neighbors
from hjepa.tasks.visualize.pca import draw_pca
from hjepa.tasks.visualize.predictions import check_predictive, draw_predictions
from hjepa.tasks.visualize.samples import Samples, some
from hjepa.tasks.visualize.tsne import draw_tsne
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import check_writable, read_records
from hjepa.tracking.tracker import Artifacts, log_artifacts

log = logging.getLogger(__name__)


def draw_masks(scene: Samples) -> list[Path]:
    """The masks of the images to show."""
    masks = scene.run.sampler(len(scene.rows), generator(0, "visualize"))
    plot_masks(scene.images, masks, scene.run.model, scene.path("masks"))
    return [scene.path("masks")]


def draw_curves(scene: Samples) -> list[Path]:
    """The curves of the run's metrics.jsonl."""
    plot_curves(read_records(scene.run.folder), scene.path("curves"))
    return [scene.path("curves")]


PICTURES: dict[str, Callable[[Samples], list[Path]]] = {
    "curves": draw_curves,
    "masks": draw_masks,
    "predictions": draw_predictions,
    "pca": draw_pca,
    "attention": draw_attention,
    "neighbors": draw_neighbors,
    "scatter": draw_tsne,
}


def visualize_run(
    config: Config,
    path: Path,
    pictures: str | list[str],
    shown: int,
    searched: int,
    checkpoint: str | None,
    root: str | None,
) -> None:
    """Draw pictures of the run that `run` names.

    Args:
        pictures: names among those of `PICTURES`, or "all" that the run has something to show for.
        shown: images in a picture's rows; searched: the most held-out images for neighbors and scatter.
        checkpoint, root: see `load_run`.

    Raises:
        UserError: an unknown picture, no such run, or one that has nothing to show for a picture that was asked for.
    """
    wanted = wanted_pictures(pictures)
    for name, value, least in (("shown", shown, 1), ("searched", searched, 2)):
        if value < least:
            raise UserError(f"task.{name}={value}: expected at least {least} images.")
    folder = run_folder(config) / "visualize"
    check_writable(folder)
    run = load_run(config, checkpoint, root)
    _, validation = run.dataset.train_and_validation()
    scene = Samples(run, folder, some(validation, max(shown, searched)), shown)
    if not run.model.predictor and pictures == "all":
        wanted.remove("predictions")
        log.info("This run predicts nothing (levels=none), so predictions are left out.")
    if "predictions" in wanted:
        check_predictive(scene)
    folder.mkdir(exist_ok=True)
    drawn = []
    for name in (bar := tqdm(wanted, unit="picture", disable=None)):
        bar.set_postfix_str(name)
        drawn += PICTURES[name](scene)
    summary = {
        "status": "finished",
        "pictures": [file.name for file in drawn],
        "checkpoint": run.checkpoint.name,
        "hash": run.hash,
        "step": run.step,
        "images": len(scene.held_out),
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    log_artifacts(config, run.folder, Artifacts(drawn, "visualize"))
    for file in drawn:
        print(f"{file.stem:>22}: {CAPTIONS[file.stem.partition('-')[0]]}")
    print(f"Pictures of step {run.step}: {folder}")


def wanted_pictures(pictures: str | list[str]) -> list[str]:
    """The names of the pictures to draw, each once."""
    if pictures == "all":
        return list(PICTURES)
    names = list(dict.fromkeys([pictures] if isinstance(pictures, str) else pictures))
    unknown = [name for name in names if name not in PICTURES]
    if unknown or not names:
        raise UserError(f"task.pictures={pictures}: expected all, or names among {', '.join(PICTURES)}.")
    return names
