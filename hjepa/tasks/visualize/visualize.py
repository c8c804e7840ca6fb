"""`task=visualize run=...`: draw pictures of a run into the folder `visualize/` of the run, and log them to its trackers.

To add a picture, write a function of `Samples` that returns the paths of its files, list it in `PICTURES`, and add a caption to
`hjepa.plotting.CAPTIONS`. If some runs cannot have the picture, list a check in `CHECKS`.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from hjepa.config.errors import UserError
from hjepa.config.schema import Config
from hjepa.config.terminal import progress_bar
from hjepa.config.types import PositiveInt
from hjepa.distributed.seeding import generator
from hjepa.plotting import CAPTIONS, plot_curves, plot_masks
from hjepa.tasks.trained_run import load_run, run_folder
from hjepa.tasks.visualize.attention import check_attention, draw_attention
from hjepa.tasks.visualize.neighbors import draw_neighbors
from hjepa.tasks.visualize.pca import draw_pca
from hjepa.tasks.visualize.predictions import check_predictions, draw_predictions
from hjepa.tasks.visualize.samples import Samples, select_samples
from hjepa.tasks.visualize.summary import write_summary
from hjepa.tasks.visualize.tsne import MIN_POINTS, check_tsne, draw_tsne
from hjepa.tasks.visualize.views import check_views, draw_views
from hjepa.tracking.run_folder import check_writable, read_records
from hjepa.tracking.tracker import Artifacts, log_artifacts

log = logging.getLogger(__name__)


def check_masks(samples: Samples) -> None:
    """Raise `UserError` if the run hides no patches."""
    if not samples.run.sampler.hides_patches:
        raise UserError(f"{samples.run.folder.name} hides no patches (masking=none): leave masks out of task.pictures.")


def draw_masks(samples: Samples) -> list[Path]:
    """Draw the masks of the images to show."""
    masks = samples.run.sampler(len(samples.shown), generator(0, "visualize"))
    path = samples.path("masks")
    plot_masks(samples.images, masks, samples.run.model, path)
    return [path]


def draw_curves(samples: Samples) -> list[Path]:
    """Draw the curves of metrics.jsonl."""
    path = samples.path("curves")
    plot_curves(read_records(samples.run.folder), path)
    return [path]


PICTURES: dict[str, Callable[[Samples], list[Path]]] = {
    "curves": draw_curves,
    "masks": draw_masks,
    "views": draw_views,
    "predictions": draw_predictions,
    "pca": draw_pca,
    "attention": draw_attention,
    "neighbors": draw_neighbors,
    "scatter": draw_tsne,
}

# Pictures that not every run can have, with a function that raises `UserError` for runs that cannot.
CHECKS: dict[str, Callable[[Samples], None]] = {
    "masks": check_masks,
    "views": check_views,
    "predictions": check_predictions,
    "attention": check_attention,
    "scatter": check_tsne,
}


def visualize_run(
    config: Config,
    path: Path,
    pictures: str | list[str],
    shown: PositiveInt,
    searched: PositiveInt,
    checkpoint: str | None,
    root: str | None,
) -> None:
    """Draw pictures of the run.

    Args:
        config: Resolved config, whose `run` names the run folder.
        path: Not used.
        pictures: Names of pictures, see `PICTURES`, or "all" for those that the run can have.
        shown: Number of images in the rows of a picture.
        searched: Largest number of held-out images for neighbors and scatter.
        checkpoint: See `hjepa.tasks.trained_run.load_run`.
        root: See `hjepa.tasks.trained_run.load_run`.

    Raises:
        UserError: If a picture is unknown, the run does not exist, or it cannot have a picture that was requested by name.
    """
    names = picture_names(pictures)
    if searched < 2:
        raise UserError(f"task.searched={searched}: expected at least 2 images.")
    folder = run_folder(config) / "visualize"
    check_writable(folder, "make it writable, or copy the run elsewhere")
    run = load_run(config, checkpoint, root)
    _, validation = run.dataset.train_and_validation()
    samples = Samples(run, folder, select_samples(validation, max(shown, searched)), shown)
    available = available_pictures(names, samples, skip=pictures == "all")
    folder.mkdir(exist_ok=True)
    files = []
    for name in (bar := progress_bar(available, desc="drawing pictures", unit="picture")):
        bar.set_postfix_str(name)
        files += PICTURES[name](samples)
    enough = replace(samples, split=select_samples(validation, MIN_POINTS))  # whatever the number of images of this command
    write_summary(run, files, list(impossible_pictures(PICTURES, enough)), len(samples.split))
    log_artifacts(config, run.folder, Artifacts(files, "visualize"))
    for file in files:
        print(f"{file.stem:>22}: {CAPTIONS[file.stem.partition('-')[0]]}")
    print(f"Pictures of step {run.step}: {folder}")


def picture_names(pictures: str | list[str]) -> list[str]:
    """Return the names of the requested pictures without duplicates.

    Raises:
        UserError: If a name is unknown, or there is none.
    """
    if pictures == "all":
        return list(PICTURES)
    names = list(dict.fromkeys([pictures] if isinstance(pictures, str) else pictures))
    if not names or not PICTURES.keys() >= set(names):
        raise UserError(f"task.pictures={pictures}: expected all, or names among {', '.join(PICTURES)}.")
    return names


def available_pictures(names: list[str], samples: Samples, skip: bool) -> list[str]:
    """Return the pictures that the run can have; the others are skipped, or raise `UserError` if `skip` is false."""
    reasons = impossible_pictures(names, samples)
    for name, reason in reasons.items():
        if not skip:
            raise reason
        log.info("The picture %s is skipped. %s", name, reason)
    return [name for name in names if name not in reasons]


def impossible_pictures(names: Iterable[str], samples: Samples) -> dict[str, UserError]:
    """Return which of these pictures the run cannot have, with the reasons."""
    reasons = {}
    for name in names:
        try:
            if name in CHECKS:
                CHECKS[name](samples)
        except UserError as error:
            reasons[name] = error
    return reasons
