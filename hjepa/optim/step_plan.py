"""The batch size of every optimizer step of a run, and the steps at which its epochs end."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from hjepa.config.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """Epochs of complete batches; the images that are left over at the end of an epoch are dropped, different ones each time.

    Args:
        num_images: Number of training images.
        epochs: Length of the run in epochs, or None.
        length: Length of the run in optimizer steps, or None; exactly one of `epochs` and `length` is set.
        batch_size: Images per step after the warm-up of the batch size.
        batch_start: Batch size of the first epoch, or None for a constant batch size.
        batch_warmup: Number of epochs over which the batch size grows linearly.
        divisor: Every batch size is a multiple of this number.
    """

    num_images: int
    epochs: int | None
    length: int | None
    batch_size: int
    batch_start: int | None = None
    batch_warmup: int = 0
    divisor: int = 1

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.length is None):
            raise UserError(
                f"train.epochs={self.epochs} and train.steps={self.length}: set exactly one of them, the other to null."
            )
        if self.batch_size > self.num_images:
            raise UserError(
                f"train.batch_size={self.batch_size}: expected at most {self.num_images}, the number of training images."
            )
        if self.batch_size % self.divisor:
            raise UserError(
                f"train.batch_size={self.batch_size} cannot be divided into {self.divisor} equal parts (train.accumulate times "
                "the number of processes); choose a multiple."
            )
        if (self.batch_start is None) != (self.batch_warmup == 0):
            raise UserError(
                f"train.batch_start={self.batch_start} and train.batch_warmup={self.batch_warmup} belong together: set a batch "
                "size to start from and the number of epochs over which it grows, or null and 0."
            )
        if self.batch_start is not None and not self.divisor <= self.batch_start <= self.batch_size:
            raise UserError(
                f"train.batch_start={self.batch_start}: expected a value from {self.divisor} (train.accumulate times the number "
                f"of processes) to train.batch_size={self.batch_size}."
            )

    def batch_size_in_epoch(self, epoch: int) -> int:
        """Return the images per step in an epoch, counted from 0."""
        if self.batch_start is None or epoch >= self.batch_warmup:
            return self.batch_size
        size = self.batch_start + (self.batch_size - self.batch_start) * epoch / self.batch_warmup
        return int(size) // self.divisor * self.divisor

    def steps_in_epoch(self, epoch: int) -> int:
        """Return the number of steps of a complete epoch."""
        return self.num_images // self.batch_size_in_epoch(epoch)

    @cached_property
    def epoch_ends(self) -> list[int]:
        """The number of completed steps at the end of each epoch; the last epoch may be incomplete."""
        if self.epochs is not None:
            return list(accumulate(self.steps_in_epoch(epoch) for epoch in range(self.epochs)))
        ends, length = [0], self.length or 0
        while ends[-1] < length:
            ends.append(min(length, ends[-1] + self.steps_in_epoch(len(ends) - 1)))
        return ends[1:]

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps of the run."""
        return self.epoch_ends[-1]

    def steps_in_first(self, epochs: float) -> int:
        """Return the number of steps in the first `epochs` epochs, which may be a fraction."""
        full = int(epochs)
        return sum(self.steps_in_epoch(epoch) for epoch in range(full)) + round((epochs - full) * self.steps_in_epoch(full))

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and the position of its first image in the order of that epoch, both counted from 0."""
        epoch = bisect_right(self.epoch_ends, step)
        return epoch, (step - self.first_step(epoch)) * self.batch_size_in_epoch(epoch)

    def first_step(self, epoch: int) -> int:
        """Return the first step of an epoch."""
        return self.epoch_ends[epoch - 1] if epoch else 0

    def batch_size_at(self, step: int) -> int:
        """Return the number of images of a step."""
        return self.batch_size_in_epoch(bisect_right(self.epoch_ends, step))

    def images_seen(self, num_steps: int) -> int:
        """Return the number of images in the first `num_steps` steps."""
        epoch = bisect_left(self.epoch_ends, num_steps)
        earlier = sum((self.epoch_ends[e] - self.first_step(e)) * self.batch_size_in_epoch(e) for e in range(epoch))
        return earlier + (num_steps - self.first_step(epoch)) * self.batch_size_in_epoch(epoch)

    def epochs_done(self, num_steps: int) -> float:
        """Return the number of epochs, with the fraction of the last one, in the first `num_steps` steps."""
        epoch = bisect_left(self.epoch_ends, num_steps)
        return epoch + (num_steps - self.first_step(epoch)) / self.steps_in_epoch(epoch)
