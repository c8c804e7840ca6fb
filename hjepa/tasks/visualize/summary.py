"""visualize/summary.json of a run: which pictures were drawn, of which step, and which the run cannot have.

pictures                  files of the last command
checkpoint, hash, step    the checkpoint that the last command has drawn
steps                     file -> step of its checkpoint, also for the files of earlier commands
skipped                   pictures that the run cannot have
images                    number of held-out images of the last command
"""

import json
from collections.abc import Sequence
from pathlib import Path

from hjepa.tasks.trained_run import TrainedRun
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import read_summary


def write_summary(run: TrainedRun, files: Sequence[Path], skipped: Sequence[str], num_images: int) -> None:
    """Write summary.json beside the pictures.

    Args:
        run: Run at the checkpoint that was drawn.
        files: The pictures that were drawn.
        skipped: Names of pictures that the run cannot have.
        num_images: Number of held-out images.
    """
    folder = run.folder / "visualize"
    earlier = {name: step for name, step in picture_steps(folder).items() if (folder / name).exists()}
    summary = {
        "status": "finished",
        "pictures": [file.name for file in files],
        "skipped": list(skipped),
        "checkpoint": run.checkpoint.name,
        "hash": run.hash,
        "step": run.step,
        "steps": earlier | {file.name: run.step for file in files},
        "images": num_images,
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def picture_steps(folder: Path) -> dict[str, int]:
    """Return the steps of the checkpoints that the pictures of a folder show, by file name; earlier versions stored one step."""
    summary = read_summary(folder)
    return dict.fromkeys(summary.get("pictures", []), summary.get("step")) | summary.get("steps", {})
