"""Images that do not fit in memory: worker processes decode the batches of coming steps.

A worker receives the positions of a batch and returns its images. The images of a step are a function of the step, so a stream
can begin at any step, and its batches equal those from decoded images in memory.
"""

import signal
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hjepa.config.errors import UserError
from hjepa.data.image_files import ImageFiles

Batch = tuple[Tensor, dict[str, str]]  # images uint8 [B, 3, S, S], and the reasons for unreadable files by path


class BatchDataset(Dataset[Batch]):
    """A dataset whose items are batches, indexed by lists of positions."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, positions: list[int]) -> Batch:
        return self.files.decode(positions)


class StepSampler(Sampler[list[int]]):
    """Yields the positions of the batch of every step from `first` to `end`, exclusive."""

    def __init__(self, indices: Callable[[int], Tensor], first: int, end: int) -> None:
        self.indices, self.first, self.end = indices, first, end

    def __iter__(self) -> Iterator[list[int]]:
        return (self.indices(step).tolist() for step in range(self.first, self.end))


class Stream:
    """Batches of image files by step, decoded ahead of time as long as steps follow one another.

    Args:
        files: The image files; `files.workers` is the number of decoding processes. 0 decodes in this process, None uses one
            process per CPU thread, at most 8.
        indices: Returns the positions [B] of a step's images.
        end: Number of steps.
        device: Device that receives the images.
    """

    def __init__(self, files: ImageFiles, indices: Callable[[int], Tensor], end: int, device: torch.device) -> None:
        self.files, self.indices, self.end, self.device = files, indices, end, device
        self.next_step = -1
        self.batches: Iterator[Batch] = iter(())

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, step: int) -> Tensor:
        """Return the images of a step, uint8 [B, 3, S, S] on the device.

        Raises:
            UserError: More images than tolerated cannot be read, or a worker was killed.
        """
        if step != self.next_step:
            self.close()
            self.batches = self.start_workers(step)
        try:
            images, errors = next(self.batches)
        except (RuntimeError, OSError, EOFError) as error:
            if self.num_workers == 0 or str(error).startswith("Caught"):  # raised by our own code, here or in a worker
                raise
            raise UserError(
                f"A process that decodes images died ({error}), most likely because memory or shared memory ran out; "
                f"lower {self.files.corrupt.option_group}.workers and start the same command again, which continues a run."
            ) from error
        self.next_step = step + 1
        if self.next_step == self.end:
            self.close()
        self.files.corrupt.report(errors)
        return images.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Shut down the workers; the next batch starts new ones."""
        self.batches, self.next_step = iter(()), -1

    @property
    def num_workers(self) -> int:
        """Number of decoding processes; 0 decodes in this process."""
        return min(8, torch.get_num_threads()) if self.files.workers is None else self.files.workers

    def start_workers(self, step: int) -> Iterator[Batch]:
        """Return an iterator over the batches from a step on."""
        loader: DataLoader[Batch] = DataLoader(
            BatchDataset(self.files),
            batch_size=None,
            sampler=StepSampler(self.indices, step, self.end),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_group_signals,
            generator=torch.Generator(),  # otherwise the loader would advance the global generator
        )
        return iter(loader)


def ignore_group_signals(worker: int) -> None:
    """Leave signals to the whole process group (Ctrl-C, a scheduler's SIGTERM) to the training process.

    The training process saves and then ends its workers. Only a second SIGTERM ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
