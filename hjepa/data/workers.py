"""Worker processes that decode batches of images into memory that they share with the training process.

Every worker has a pipe of its own, and room for its next batches in memory that is shared when it starts. Workers thus need no
locks and no space in /dev/shm, and one that dies or blocks cannot hold up the training process, which watches it while it waits.
"""

import mmap
import multiprocessing
import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import torch
import torch.multiprocessing  # lets tensors be sent to processes that are not forked
from torch import Tensor

from hjepa.config.errors import SCRIPT_ADVICE, UserError
from hjepa.data.image_files import ImageFiles

Batch = tuple[Tensor, dict[str, str]]  # images uint8 [B, 3, S, S], and the reasons for unreadable files by name

# Forked processes share the list of files with this one; Apple's libraries do not survive a fork.
START_METHOD = "spawn" if sys.platform in ("darwin", "win32") else "fork"

SLOTS = 2  # batches that a worker decodes ahead

BLOCKED_SECONDS = 45  # without any use of the processor, after which a worker counts as blocked

STOP_SECONDS = 5  # to wait for a batch after the process has been asked to stop


class Interrupted(Exception):
    """The process was asked to stop while it waited for images."""


class Workers:
    """Processes that decode batches, in turn.

    Args:
        files: The image files.
        count: Number of processes.
        batch_size: Largest number of images of a batch.

    Raises:
        UserError: A process could not be started.
    """

    def __init__(self, files: ImageFiles, count: int, batch_size: int) -> None:
        self.context: Any = multiprocessing.get_context(START_METHOD)
        self.files, self.count = files, count
        self.images = self.share(count, SLOTS, batch_size, 3, files.size, files.size, dtype=torch.uint8)
        self.positions = self.share(count, SLOTS, batch_size, dtype=torch.int64)
        self.reading = self.share(count, dtype=torch.int64)  # position of the file that each worker reads
        self.num_submitted = self.num_received = 0
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        self.close = weakref.finalize(self, kill, self.processes, os.getpid())
        for worker in range(count):
            self.start(worker)

    def share(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor in memory that is shared with processes started later."""
        if START_METHOD != "fork":
            return torch.empty(shape, dtype=dtype).share_memory_()
        numel = torch.Size(shape).numel()
        return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype).view(shape)  # not in /dev/shm

    def start(self, worker: int) -> None:
        """Start a worker."""
        ours, theirs = self.context.Pipe()
        arguments = (theirs, self.files, self.images[worker], self.positions[worker], self.reading[worker : worker + 1])
        process = self.context.Process(target=work, args=arguments, daemon=True)
        try:
            process.start()
        except OSError as error:
            self.close()
            group = self.files.corrupt.option_group
            raise UserError(
                f"{group}.workers={self.count}: process {worker + 1} could not be started ({error.strerror}); use fewer workers."
            ) from error
        theirs.close()  # so that the pipe ends with the worker
        self.processes.append(process)
        self.connections.append(ours)

    def submit(self, positions: Tensor) -> None:
        """Let a worker decode the images at some positions; at most `SLOTS` batches per worker may be under way."""
        turn, worker = divmod(self.num_submitted, self.count)
        self.positions[worker, turn % SLOTS, : len(positions)] = positions
        self.num_submitted += 1
        try:
            self.connections[worker].send(len(positions))
        except OSError:
            raise self.death(worker) from None

    def receive(self, stop: object) -> Batch:
        """Return the oldest batch that was submitted; its images are overwritten by the next one that is submitted.

        Args:
            stop: True once the process has been asked to stop.

        Raises:
            Interrupted: The process was asked to stop, and the batch did not arrive within seconds.
            UserError: A worker died or is blocked.
        """
        turn, worker = divmod(self.num_received, self.count)
        self.wait(worker, stop)
        try:
            result: tuple[int, dict[str, str]] | str = self.connections[worker].recv()
        except (EOFError, OSError):
            raise self.death(worker) from None
        if isinstance(result, str):
            raise RuntimeError(f"A process that decodes images failed:\n{result}")
        self.num_received += 1
        size, errors = result
        return self.images[worker, turn % SLOTS, :size], errors

    def wait(self, worker: int, stop: object) -> None:
        """Wait until a worker has sent something or has died; see `receive`."""
        seconds = idle_seconds = 0  # counted, since a process may be suspended and continued
        used = processor_time(self.processes[worker])
        while not self.connections[worker].poll(1):
            seconds += 1
            if stop and seconds >= STOP_SECONDS:
                raise Interrupted
            before, used = used, processor_time(self.processes[worker])
            idle_seconds = idle_seconds + 1 if used == before else 0
            if idle_seconds >= BLOCKED_SECONDS:
                raise UserError(
                    f"A process that decodes images has been blocked for {idle_seconds} seconds while it read "
                    f"{self.files.name(int(self.reading[worker]))}; check this file and its disk, and start the same command "
                    "again, which continues a run."
                )

    def death(self, worker: int) -> UserError:
        """Return the error for a worker that died."""
        process, group = self.processes[worker], self.files.corrupt.option_group
        process.join(1)
        code = process.exitcode
        if code is None or code >= 0:
            return UserError(f"A process that decodes images died (exit code {code}); its output above says why. {SCRIPT_ADVICE}")
        cause = ", most likely because memory ran out" if code == -signal.SIGKILL else ""
        return UserError(
            f"A process that decodes images died (killed by {signal.Signals(-code).name}){cause}; lower {group}.workers and "
            "start the same command again, which continues a run."
        )


def kill(processes: list[BaseProcess], owner: int) -> None:
    """Kill workers, whatever they are doing, if this is the process that started them."""
    if os.getpid() == owner:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(1)


def processor_time(process: BaseProcess) -> float:
    """Return the seconds of processor time that a process has used."""
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.Error:  # it has just ended
        return 0.0
    return float(times.user + times.system)


def work(connection: Connection, files: ImageFiles, images: Tensor, positions: Tensor, reading: Tensor) -> None:
    """Decode batches until the training process ends: the main function of a worker.

    Signals to the whole process group (Ctrl-C, a scheduler's SIGTERM) are left to the training process, which saves its state
    and then kills its workers.

    Args:
        connection: Pipe on which the sizes of batches arrive.
        files: The image files.
        images: Receives the images, uint8 [SLOTS, B, 3, S, S].
        positions: Positions of the images of every batch, int64 [SLOTS, B].
        reading: Receives the position of the file that is read, int64 [1].
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = os.getppid()

    def read_in_turn(read: Callable[[int], Any], batch: list[int]) -> Iterable[Any]:
        for position in batch:
            reading[0] = position
            yield read(position)

    for turn, size in enumerate(announced(connection, parent)):
        slot = turn % SLOTS
        try:
            images[slot, :size], errors = files.decode(positions[slot, :size].tolist(), read_in_turn)
        except Exception:
            connection.send(traceback.format_exc())
            return
        connection.send((size, errors))


def announced(connection: Connection, parent: int) -> Iterator[int]:
    """Yield the sizes of the batches to decode, until the training process ends."""
    try:
        while True:
            while not connection.poll(1):
                if os.getppid() != parent:
                    return
            yield connection.recv()
    except (EOFError, OSError):
        return
