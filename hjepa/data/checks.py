"""A check of the images before training: do they differ?"""

import logging
import os

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.data.datamodule import Split, evenly_spaced_indices

log = logging.getLogger(__name__)

NUM_COMPARED = 256  # images of a split that are compared with each other


def check_images_differ(train: Split, validation: Split) -> None:
    """Compare some images of a dataset; log a warning if all validation images are the same.

    Training images are only read if the validation images are all the same.

    Raises:
        UserError: All images that were compared have the same pixels.
    """
    held_out = some_images(validation)
    if not all_equal(held_out):
        return
    compared = torch.cat([held_out, some_images(train)])
    if all_equal(compared):
        raise UserError(
            f"All {len(compared)} images that were compared have the same pixels, so that there is nothing to learn; look at the "
            "files of the dataset, which may be empty, equal copies, or use only a small part of their range of values."
        )
    if len(held_out) > 1 and os.environ.get("RANK", "0") == "0":
        log.warning(
            "All %d validation images that were compared have the same pixels, so that probes and the detection of collapse say "
            "nothing; look at the files of the dataset.",
            len(held_out),
        )


def some_images(split: Split) -> Tensor:
    """Return some images of a split, uint8 [N, 3, S, S], spread evenly over it."""
    return split.images[evenly_spaced_indices(len(split), NUM_COMPARED)]


def all_equal(images: Tensor) -> bool:
    """Return whether all images [N, 3, S, S] have the same pixels."""
    return bool((images == images[:1]).all())
