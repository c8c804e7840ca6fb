"""The plan of a run: how many images every optimizer step takes, and where the epochs end."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from hjepa.config.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """Epochs of whole batches; what is left over of an epoch is dropped, another part each time.

    Args:
        images: in the training part.
        epochs, length: of the run, in epochs or in optimizer steps; one of the two is None.
        batch_size: images per step, after the warm-up.
        batch_start, batch_warmup: batch size of the first epoch, growing linearly over `batch_warmup` epochs; None for none.
        parts: every batch size is a multiple of this.
    """

    images: int
    epochs: int | None
    length: int | None
    batch_size: int
    batch_start: int | None = None
    batch_warmup: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.length is None) or (self.epochs or self.length or 0) < 1:
            raise UserError(
                f"train.epochs={self.epochs} and train.steps={self.length}: set one to at least 1, the other to null."
            )
        if not 1 <= self.batch_size <= self.images:
            raise UserError(f"train.batch_size={self.batch_size}: expected 1 to {self.images}, the number of training images.")
        if self.parts < 1 or self.batch_size % self.parts:
            raise UserError(
                f"train.batch_size={self.batch_size} cannot be cut into {self.parts} equal parts (train.accumulate times the "
                "number of processes); choose a multiple."
            )
        if (self.batch_start is None) != (self.batch_warmup == 0) or self.batch_warmup < 0:
            raise UserError(
                f"train.batch_start={self.batch_start} and train.batch_warmup={self.batch_warmup} go together: a batch size to "
                "start from and the epochs to grow over, or null and 0."
            )
        if self.batch_start is not None and not self.parts <= self.batch_start <= self.batch_size:
            raise UserError(
                f"train.batch_start={self.batch_start}: expected train.accumulate={self.parts} to "
                f"train.batch_size={self.batch_size}."
            )

    def batch_size_in_epoch(self, epoch: int) -> int:
        """Images per step in an epoch, counted from 0."""
        if self.batch_start is None or epoch >= self.batch_warmup:
            return self.batch_size
        grown = self.batch_start + (self.batch_size - self.batch_start) * epoch / self.batch_warmup
        return int(grown) // self.parts * self.parts

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps of a whole epoch."""
        return self.images // self.batch_size_in_epoch(epoch)

    @cached_property
    def epoch_ends(self) -> list[int]:
        """The number of steps done after each epoch; the last one may be cut off."""
        if self.epochs is not None:
            return list(accumulate(self.steps_in_epoch(epoch) for epoch in range(self.epochs)))
        ends, length = [0], self.length or 0
        while ends[-1] < length:
            ends.append(min(length, ends[-1] + self.steps_in_epoch(len(ends) - 1)))
        return ends[1:]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epoch_ends[-1]

    def steps_in_first(self, epochs: float) -> int:
        """Steps in the first `epochs` epochs."""
        whole = int(epochs)
        return sum(self.steps_in_epoch(epoch) for epoch in range(whole)) + round((epochs - whole) * self.steps_in_epoch(whole))

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step and the first image that it takes in the epoch's order, both from 0."""
        epoch = bisect_right(self.epoch_ends, step)
        return epoch, (step - self.first_step(epoch)) * self.batch_size_in_epoch(epoch)

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        return self.epoch_ends[epoch - 1] if epoch else 0

    def batch_size_at(self, step: int) -> int:
        """Images of a step."""
        return self.batch_size_in_epoch(bisect_right(self.epoch_ends, step))

    def images_seen(self, done: int) -> int:
        """Images in the first `done` steps."""
        epoch = bisect_left(self.epoch_ends, done)
        before = sum((self.epoch_ends[e] - self.first_step(e)) * self.batch_size_in_epoch(e) for e in range(epoch))
        return before + (done - self.first_step(epoch)) * self.batch_size_in_epoch(epoch)

    def epochs_done(self, done: int) -> float:
        """Epochs in the first `done` steps."""
        epoch = bisect_left(self.epoch_ends, done)
        return epoch + (done - self.first_step(epoch)) / self.steps_in_epoch(epoch)
