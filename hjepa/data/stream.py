"""Images that do not fit in memory: the batches of coming steps are decoded ahead by worker processes.

A worker gets the positions of one batch and returns its images. Which images a step trains on is a function of the step, so
the stream can begin at any step, and its batches are those that indexing the decoded images would give.
"""

import signal
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hjepa.config.errors import UserError
from hjepa.data.image_files import ImageFiles

Batch = tuple[Tensor, dict[str, str]]  # images uint8 [B, 3, S, S]; unreadable files and why


class BatchDataset(Dataset[Batch]):
    """What a worker does: positions of a batch -> `Batch`."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, positions: list[int]) -> Batch:
        return self.files.decode(positions)


class StepSampler(Sampler[list[int]]):
    """The positions of the batches of the steps from `first` to before `end`."""

    def __init__(self, indices: Callable[[int], Tensor], first: int, end: int) -> None:
        self.indices, self.first, self.end = indices, first, end

    def __iter__(self) -> Iterator[list[int]]:
        return (self.indices(step).tolist() for step in range(self.first, self.end))


class Stream:
    """Batches of files by step, ahead of time when the steps follow one another.

    Args:
        indices: the positions [B] of a step's images; end: number of steps.
        device: where the images are needed.
    """

    def __init__(self, files: ImageFiles, indices: Callable[[int], Tensor], end: int, device: torch.device) -> None:
        self.files, self.indices, self.end, self.device = files, indices, end, device
        self.next = -1
        self.batches: Iterator[Batch] = iter(())

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, step: int) -> Tensor:
        """The images of a step, uint8 [B, 3, S, S] on the device.

        Raises:
            UserError: more images than tolerated cannot be read, or a worker was killed.
        """
        if step != self.next:
            self.close()
            self.batches = self.start(step)
        try:
            images, bad = next(self.batches)
        except (RuntimeError, OSError, EOFError) as error:
            if self.workers == 0 or str(error).startswith("Caught"):  # in our own code, here or in a worker
                raise
            raise UserError(
                f"A process that decodes images died ({error}), most likely for want of memory or shared memory; "
                f"set {self.files.corrupt.group}.workers to fewer and give the same command again, which continues a run."
            ) from error
        self.next = step + 1
        if self.next == self.end:
            self.close()
        self.files.corrupt.report(bad)
        return images.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Let the workers go; the next batch starts others."""
        self.batches, self.next = iter(()), -1

    @property
    def workers(self) -> int:
        """Processes that decode; 0 for this one."""
        return min(8, torch.get_num_threads()) if self.files.workers is None else self.files.workers

    def start(self, step: int) -> Iterator[Batch]:
        """Batches from a step on."""
        loader: DataLoader[Batch] = DataLoader(
            BatchDataset(self.files),
            batch_size=None,
            sampler=StepSampler(self.indices, step, self.end),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # else the loader would draw from the global one
        )
        return iter(loader)


def leave_signals(worker: int) -> None:
    """A signal to the whole process group (Ctrl-C, a scheduler's SIGTERM) is for the training process, which saves and then
    ends its workers; only a second SIGTERM ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
