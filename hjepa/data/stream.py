"""Images that do not fit in memory: worker processes decode the batches of coming steps.

The images of a step are a function of the step, so a stream can begin at any step, and its batches equal those from decoded
images in memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hjepa.data.image_files import ImageFiles
from hjepa.data.workers import SLOTS, Workers


class Stream:
    """Batches of image files by step, decoded ahead of time as long as steps follow one another.

    Args:
        files: The image files; `files.workers` is the number of decoding processes. 0 decodes in this process, None uses one
            process per CPU thread, at most 8.
        indices: Returns the positions [B] of a step's images.
        batch_size: Largest number of images of a step.
        end: Number of steps.
        device: Device that receives the images.
    """

    def __init__(
        self, files: ImageFiles, indices: Callable[[int], Tensor], batch_size: int, end: int, device: torch.device
    ) -> None:
        self.files, self.indices, self.batch_size, self.end, self.device = files, indices, batch_size, end, device
        self.next_step = -1
        self.workers: Workers | None = None

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, step: int, stop: object = False) -> Tensor:
        """Return the images of a step, uint8 [B, 3, S, S] on the device.

        Args:
            step: The step.
            stop: True once the process has been asked to stop, so that no more images are needed.

        Raises:
            Interrupted: The process was asked to stop, and the workers did not deliver the images within seconds.
            UserError: More images than tolerated cannot be read, or a worker died or is blocked.
        """
        if step != self.next_step:
            self.close()
        if self.num_workers == 0:
            images, errors = self.files.decode(self.indices(step).tolist())
        else:
            self.workers = self.workers or self.start_workers(step)
            images, errors = self.workers.receive(stop)
        self.files.corrupt.report(errors)
        images = self.to_device(images)
        if self.workers and (ahead := step + SLOTS * self.workers.count) < self.end:
            self.workers.submit(self.indices(ahead))
        self.next_step = step + 1
        if self.next_step == self.end:
            self.close()
        return images

    def to_device(self, images: Tensor) -> Tensor:
        """Copy images to the device."""
        if self.device.type == "cuda":
            return images.pin_memory().to(self.device, non_blocking=True)
        return images.to(self.device, copy=True)

    def close(self) -> None:
        """Shut down the workers; the next batch starts new ones."""
        if self.workers:
            self.workers.close()
        self.workers, self.next_step = None, -1

    @property
    def num_workers(self) -> int:
        """Number of decoding processes; 0 decodes in this process."""
        return min(8, torch.get_num_threads()) if self.files.workers is None else self.files.workers

    def start_workers(self, step: int) -> Workers:
        """Start the workers, which decode the batches from a step on."""
        workers = Workers(self.files, self.num_workers, self.batch_size)
        for ahead in range(step, min(step + SLOTS * workers.count, self.end)):
            workers.submit(self.indices(ahead))
        return workers
