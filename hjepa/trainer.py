"""The training loop. `Trainer.step` is one optimizer step, in the order of the data flow; `Trainer.fit` is the run.

Schedules are applied before the update; the teacher moves after it, once per optimizer step, also under accumulation.
Nothing in the step waits for the device: losses stay there until they are logged.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from tqdm import tqdm

from hjepa.checkpoint import Checkpoints, State
from hjepa.data import Dataset
from hjepa.errors import UserError
from hjepa.files import Files
from hjepa.hardware import Hardware
from hjepa.losses import Objective
from hjepa.masks import Masks, Sampler
from hjepa.meter import Meter
from hjepa.model import HJEPA
from hjepa.optim import set_rates
from hjepa.rng import generator, seed_global
from hjepa.schedules import Schedule
from hjepa.signals import StopFlag, Stopped
from hjepa.stream import Stream
from hjepa.teacher import EMA
from hjepa.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a run is made of, instantiated from the config groups."""

    seed: int
    hardware: Hardware
    dataset: Dataset
    sampler: Sampler
    model: HJEPA
    objective: Objective
    teacher: EMA
    optimizer: Optimizer
    lr: Schedule
    weight_decay: Schedule


class Trainer:
    """Trains the student of `parts` on images.

    Args:
        parts: see `Parts`; images: the training images, uint8 [N, 3, S, S], or files of them.
        epochs, steps: length of the run; one of the two is None.
        batch_size: images per optimizer step; accumulate: equal parts that a batch is computed in, to save memory.
        clip_norm: largest gradient norm, None for no clipping.
        log_every: steps between two records of the losses.
        stop_on_collapse: end a collapsed run instead of only warning.
    """

    def __init__(
        self,
        parts: Parts,
        images: Tensor | Files,
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        accumulate: int,
        clip_norm: float | None,
        log_every: int,
        stop_on_collapse: bool,
    ) -> None:
        check_lengths(len(images), epochs, steps, batch_size, accumulate, log_every)
        self.parts, self.model, self.device = parts, parts.model, parts.hardware.device
        self.batch_size, self.accumulate, self.log_every = batch_size, accumulate, log_every
        self.clip_norm = float("inf") if clip_norm is None else clip_norm
        self.stop_on_collapse = stop_on_collapse
        self.steps_per_epoch = len(images) // batch_size
        self.steps = steps or (epochs or 0) * self.steps_per_epoch
        self.images = (
            images.to(self.device) if isinstance(images, Tensor) else Stream(images, self.indices, self.steps, self.device)
        )
        self.lr = parts.lr(self.steps, self.steps_per_epoch)
        self.weight_decay = parts.weight_decay(self.steps, self.steps_per_epoch)
        parts.teacher.plan(self.steps, self.steps_per_epoch)
        self.trainable = [p for p in parts.model.parameters() if p.requires_grad]
        self.scaler = parts.hardware.scaler()
        self.meter = Meter()
        self.ordered_epoch, self.permutation = -1, torch.empty(0)
        self.done, self.seconds = 0, 0.0

    # -- one step ------------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Tensor, Masks]:
        """Augmented images [B, 3, S, S] and masks of a step, both a function of the seed and the step alone."""
        seed, dataset = self.parts.seed, self.parts.dataset
        images = dataset.augmented(self.pixels(step), generator(seed, "augment", step))
        masks = self.parts.sampler(self.batch_size, generator(seed, "masks", step))
        return images, masks.to(self.device)

    def pixels(self, step: int) -> Tensor:
        """The images of a step, uint8 [B, 3, S, S] on the device."""
        if isinstance(self.images, Stream):
            return self.images.batch(step)
        return self.images[self.indices(step).to(self.device)]

    def close(self) -> None:
        """Let go of what decodes the images."""
        if isinstance(self.images, Stream):
            self.images.close()

    def indices(self, step: int) -> Tensor:
        """The images of a step: consecutive parts of a permutation of its epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch, kept until another one is asked for."""
        if self.ordered_epoch != epoch:
            self.ordered_epoch = epoch
            self.permutation = torch.randperm(len(self.images), generator=generator(self.parts.seed, "order", epoch))
        return self.permutation

    def step(self, images: Tensor, masks: Masks, step: int) -> dict[str, Tensor]:
        """One optimizer step on a batch; returns the named terms, 0-d tensors on the device."""
        parts = self.parts
        set_rates(parts.optimizer, self.lr[step], self.weight_decay[step])
        seed_global(parts.seed, "step", step)
        sums: dict[str, Tensor] = {}
        for part, part_masks in zip(images.chunk(self.accumulate), masks.split(self.accumulate), strict=True):
            with parts.hardware.autocast():
                output = self.model(part, part_masks)
                loss, terms = parts.objective(output)
            self.scaler.scale(loss / self.accumulate).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + value / self.accumulate if name in sums else value / self.accumulate
        self.scaler.unscale_(parts.optimizer)
        sums["gradient_norm"] = clip_grad_norm_(self.trainable, self.clip_norm)
        self.scaler.step(parts.optimizer)
        self.scaler.update()
        parts.optimizer.zero_grad()
        parts.teacher.update(self.model.teacher, self.model.student, step)
        return sums

    # -- the run -------------------------------------------------------------------------------------------------------

    def fit(self, watch: Watch, checkpoints: Checkpoints, record: Callable[[dict[str, Any]], None]) -> None:
        """Train from where the state is to the last step, measuring, recording and saving on the way.

        Raises:
            Stopped: the process was asked to stop; the state is saved.
            UserError: a loss was not finite, or the run collapsed and `stop_on_collapse` is set.
        """
        if self.done == 0:
            record({"step": 0, **watch.begin()})
            self.save(watch, checkpoints)
        self.model.train()
        with StopFlag() as stop, tqdm(total=self.steps, initial=self.done, unit="step", disable=None) as bar:
            interval = self.seconds
            while self.done < self.steps:
                began = time.perf_counter()
                self.meter.add(self.step(*self.batch(self.done), self.done))
                self.done += 1
                bar.update()
                last_of_epoch = self.done % self.steps_per_epoch == 0 or self.done == self.steps
                logging_now = self.done % self.log_every == 0
                losses = self.read_interval() if logging_now else {}
                self.seconds += time.perf_counter() - began
                if logging_now:
                    self.report(losses, self.seconds - interval, record, bar)
                    interval = self.seconds
                if last_of_epoch:
                    self.end_epoch(watch, checkpoints, record)
                elif stop or checkpoints.due():
                    self.save(watch, checkpoints)
                if stop and self.done < self.steps:
                    raise Stopped(f"stopped by signal {stop.number} at step {self.done} of {self.steps}")

    def read_interval(self) -> dict[str, float]:
        """Mean losses since the last report; refuses to go on from one that is not finite."""
        self.refuse_non_finite()
        return self.meter.interval()

    def report(self, losses: dict[str, float], seconds: float, record: Callable[[dict[str, Any]], None], bar: Any) -> None:
        """Record the losses of the last interval, the rates of its last step, and the speed."""
        step, speed = self.done - 1, self.log_every * self.batch_size / max(seconds, 1e-9)
        rates = {
            "lr": self.lr[step],
            "weight_decay": self.weight_decay[step],
            "momentum": self.parts.teacher.momentum[step],
            "images_per_second": speed,
            "peak_memory_mb": self.parts.hardware.peak_memory_mb(),
        }
        record({"step": self.done, **{f"train/{name}": value for name, value in losses.items()}, **rates})
        bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
        if bar.disable and self.done % (10 * self.log_every) == 0:
            log.info("step %d of %d: loss %.4f, %.0f images/s", self.done, self.steps, losses["loss"], speed)

    def end_epoch(self, watch: Watch, checkpoints: Checkpoints, record: Callable[[dict[str, Any]], None]) -> None:
        """Measure, record and save at the end of an epoch (or of the run)."""
        self.refuse_non_finite()
        epoch, last = -(-self.done // self.steps_per_epoch), self.done == self.steps
        probe_now = watch.probe is not None and (last or epoch % watch.probe.every == 0)
        measured = watch.epoch(probe_now)
        means = {f"epoch/{name}": value for name, value in self.meter.epoch().items()}
        record({"step": self.done, "epoch": epoch, **means, **measured})
        self.save(watch, checkpoints, epoch, watch.latest.get("linear") if probe_now else None)
        scores = ", ".join(f"{name} {watch.latest[name]:.1%}" for name in ("linear", "knn") if probe_now and name in watch.latest)
        log.info(
            "epoch %d: loss %.4f, held-out %.4f%s",
            epoch,
            means["epoch/loss"],
            measured["validation/loss"],
            scores and ", " + scores,
        )
        if watch.collapsed and self.stop_on_collapse:
            raise UserError(f"The run collapsed at step {self.done} ({watch.collapsed}) and train.stop_on_collapse is set.")

    def refuse_non_finite(self) -> None:
        """Stop on a NaN or infinite loss, naming the batch; the last checkpoint was saved while all was finite."""
        ago = self.meter.first_bad()
        if ago is not None:
            step = self.done - 1 - ago
            raise UserError(
                f"The loss or gradient of step {step} is not finite. Images of its batch (positions in the training part): "
                f"{self.indices(step).tolist()}. The last good state is checkpoints/latest.pt; lower optimizer.lr or "
                "set train.clip_norm."
            )

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self, watch: Watch, checkpoints: Checkpoints, epoch: int | None = None, score: float | None = None) -> None:
        """Save the whole state; never one that holds a loss that is not finite."""
        self.refuse_non_finite()
        checkpoints.save(self.state() | {"watch": watch.state()}, epoch, score)

    def state(self) -> State:
        """Everything needed to go on bit for bit."""
        return {
            "step": self.done,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.parts.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state(),
        }

    def restore(self, state: State) -> None:
        """Go on from a state."""
        self.done, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.parts.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.meter.restore(state["meter"])


def check_lengths(images: int, epochs: int | None, steps: int | None, batch_size: int, accumulate: int, log_every: int) -> None:
    """Refuse a run without length, without a whole batch or without whole parts of a batch."""
    if (epochs is None) == (steps is None) or (epochs or steps or 0) < 1:
        raise UserError(f"train.epochs={epochs} and train.steps={steps}: set one to at least 1 and the other to null.")
    if not 1 <= batch_size <= images:
        raise UserError(f"train.batch_size={batch_size}: expected 1 to {images}, the number of training images.")
    if accumulate < 1 or batch_size % accumulate:
        raise UserError(f"train.accumulate={accumulate} does not divide train.batch_size={batch_size} into equal parts.")
    if log_every < 1:
        raise UserError(f"train.log_every={log_every}: expected at least 1.")
