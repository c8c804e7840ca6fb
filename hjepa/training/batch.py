"""The input of a training step."""

from typing import NamedTuple

from torch import Tensor

from hjepa.masking import Masks


class Batch(NamedTuple):
    """The input of a training step.

    Attributes:
        global_crops: Augmented, normalized global crops [B*V, 3, S, S]; the V crops of an image follow one another.
        masks: Contexts and targets of the global crops.
        local_crops: Local crops [B*L, 3, s, s], or None.
        boxes: Boxes [B, V+L, 2, 3] of all crops (see `hjepa.models.views`).
    """

    global_crops: Tensor
    masks: Masks
    local_crops: Tensor | None
    boxes: Tensor

    def split(self, num_parts: int) -> list["Batch"]:
        """Split the batch into equal parts of complete images."""
        local_crops = [None] * num_parts if self.local_crops is None else self.local_crops.chunk(num_parts)
        chunks = (self.global_crops.chunk(num_parts), self.masks.split(num_parts), local_crops, self.boxes.chunk(num_parts))
        parts = zip(*chunks, strict=True)
        return [Batch(*part) for part in parts]
