"""The training loop. `Trainer.train_step` is one optimizer step, in the order of the data flow; `Trainer.fit` is the run.

Schedules are applied before the update; the teacher moves after it, once per optimizer step, also under accumulation.
Nothing in the step waits for the device: losses stay there until they are logged.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from hjepa.config.errors import UserError
from hjepa.data.image_files import ImageFiles
from hjepa.data.stream import Stream
from hjepa.distributed.process_group import AsyncConsensus
from hjepa.distributed.seeding import generator, seed_global
from hjepa.masking import Masks
from hjepa.optim.optimizers import check_known_parts, set_rates
from hjepa.optim.step_plan import StepPlan
from hjepa.training.build import Components
from hjepa.training.checkpoint import Checkpointer, State
from hjepa.training.meter import Meter
from hjepa.training.monitor import Monitor
from hjepa.training.parallel import full_tensor
from hjepa.training.signals import StopFlag, Stopped

log = logging.getLogger(__name__)


class Trainer:
    """Trains the student of `parts` on images.

    Args:
        parts: see `Components`; images: the training images, uint8 [N, 3, S, S], or files of them.
        epochs, steps: length of the run; one of the two is None.
        batch_size: images per optimizer step; batch_start, batch_warmup: batch size of the first epoch and the epochs over
            which it grows to `batch_size`, the learning rate in proportion (Goyal et al. 2017); None and 0 for a constant one.
        accumulate: equal parts that a batch is computed in, to save memory.
        clip_norm: largest gradient norm, None for no clipping.
        log_every: steps between two records of the losses.
        stop_on_collapse: end a collapsed run instead of only warning.
    """

    def __init__(
        self,
        parts: Components,
        images: Tensor | ImageFiles,
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        batch_start: int | None,
        batch_warmup: int,
        accumulate: int,
        clip_norm: float | None,
        log_every: int,
        stop_on_collapse: bool,
    ) -> None:
        if log_every < 1:
            raise UserError(f"train.log_every={log_every}: expected at least 1.")
        self.world = parts.world
        pieces = accumulate * self.world.size
        self.plan = plan = StepPlan(len(images), epochs, steps, batch_size, batch_start, batch_warmup, pieces)
        self.parts, self.model, self.device = parts, parts.model, parts.hardware.device
        self.net = parts.strategy.wrap(self.model, parts.optimizer)
        self.accumulate, self.log_every = accumulate, log_every
        self.clip_norm = float("inf") if clip_norm is None else clip_norm
        self.stop_on_collapse = stop_on_collapse
        self.steps = plan.steps
        self.images = (
            images.to(self.device) if isinstance(images, Tensor) else Stream(images, self.indices, self.steps, self.device)
        )
        self.lr = parts.schedule.learning_rates(plan)
        self.weight_decay = parts.schedule.weight_decay(plan)
        check_known_parts(self.lr, parts.optimizer)
        parts.teacher.plan(plan)
        self.trainable = [p for p in parts.model.parameters() if p.requires_grad]
        self.scaler = parts.hardware.scaler()
        self.meter = Meter(self.world)
        self.ordered_epoch, self.permutation = -1, torch.empty(0)
        self.done, self.seconds = 0, 0.0

    # -- one step ------------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Tensor, Masks, Tensor | None]:
        """Whole views [B*V, 3, S, S], their masks, and local crops of this process' share of a step: functions of the seed and
        the step alone, drawn for the whole batch.
        """
        seed, dataset, size = self.parts.seed, self.parts.dataset, self.plan.batch_size_at(step)
        draws = dataset.draw(size, generator(seed, "augment", step))
        masks = self.parts.sampler(size * dataset.views, generator(seed, "masks", step))
        rows = self.world.rows(size, self.accumulate)
        if rows is not None:
            views = rows.unsqueeze(1) * dataset.views + torch.arange(dataset.views)
            draws, masks = draws.select(rows), masks.select(views.flatten())
        whole, crops = dataset.crops(self.pixels(step), draws)
        return whole, masks.to(self.device), crops

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
        """This process' images of a step, whose batches are consecutive parts of a permutation of its epoch."""
        (epoch, start), size = self.plan.locate(step), self.plan.batch_size_at(step)
        batch, rows = self.order(epoch)[start : start + size], self.world.rows(size, self.accumulate)
        return batch if rows is None else batch[rows]

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch, kept until another one is asked for."""
        if self.ordered_epoch != epoch:
            self.ordered_epoch = epoch
            self.permutation = torch.randperm(len(self.images), generator=generator(self.parts.seed, "order", epoch))
        return self.permutation

    def train_step(self, images: Tensor, masks: Masks, crops: Tensor | None, step: int) -> dict[str, Tensor]:
        """One optimizer step on a batch; returns the named terms, 0-d tensors on the device."""
        parts = self.parts
        set_rates(parts.optimizer, {part: rates[step] for part, rates in self.lr.items()}, self.weight_decay[step])
        seed_global(parts.seed, "step", step, *([] if self.world.main else [self.world.rank]))
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(split(images, masks, crops, self.accumulate), start=1):
            with nullcontext() if number == self.accumulate else parts.strategy.no_sync(self.net):
                with parts.hardware.autocast():
                    output = self.net(*part, parts.dataset.views)
                    loss, terms = parts.objective(output)
                self.scaler.scale(loss / self.accumulate).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + value / self.accumulate if name in sums else value / self.accumulate
        self.scaler.unscale_(parts.optimizer)
        sums["gradient_norm"] = full_tensor(clip_grad_norm_(self.trainable, self.clip_norm))
        self.scaler.step(parts.optimizer)
        self.scaler.update()
        parts.optimizer.zero_grad()
        parts.teacher.update(self.model, step)
        return sums

    # -- the run -------------------------------------------------------------------------------------------------------

    def fit(self, monitor: Monitor, checkpoints: Checkpointer, record: Callable[[dict[str, Any]], None], stop: StopFlag) -> None:
        """Train from where the state is to the last step or `stop`, measuring, recording and saving on the way.

        Raises:
            Stopped: the process was asked to stop; the state is saved.
            UserError: a loss was not finite, or the run collapsed and `stop_on_collapse` is set.
        """
        if self.done == 0:
            record({"step": 0, "seconds": 0.0, **(monitor.begin() if self.parts.strategy.measures() else {})})
            self.save(monitor, checkpoints)
        self.model.train()
        vote, quiet = AsyncConsensus(self.world), None if self.world.main else True
        with tqdm(total=self.steps, initial=self.done, unit="step", disable=quiet) as bar:
            interval = self.seconds
            while self.done < self.steps:
                began = time.perf_counter()
                self.meter.add(self.train_step(*self.batch(self.done), self.done))
                self.done += 1
                bar.update()
                logging_now = self.done % self.log_every == 0
                losses = self.read_interval() if logging_now else {}
                self.seconds += time.perf_counter() - began
                if logging_now:
                    self.report(losses, self.seconds - interval, record, bar)
                    interval = self.seconds
                stopping, requeue, due = vote(bool(stop), stop.requeue, checkpoints.due())
                if self.done in self.plan.epoch_ends:
                    self.end_epoch(monitor, checkpoints, record)
                elif stopping or due:
                    self.save(monitor, checkpoints)
                    vote.settle()
                if stopping and self.done < self.steps:
                    stop.agree(requeue)
                    raise Stopped(f"stopped by signal {stop.number} at step {self.done} of {self.steps}")
            vote.settle()

    def read_interval(self) -> dict[str, float]:
        """Mean losses since the last report; refuses to go on from one that is not finite."""
        self.check_finite()
        return self.meter.interval()

    def report(self, losses: dict[str, float], seconds: float, record: Callable[[dict[str, Any]], None], bar: Any) -> None:
        """Record the losses of the last interval, the rates of its last step, and the speed."""
        step, images = self.done - 1, self.plan.images_seen(self.done) - self.plan.images_seen(max(0, self.done - self.log_every))
        speed = images / max(seconds, 1e-9)
        rates = {
            **{f"lr/{part}" if part else "lr": rates[step] for part, rates in self.lr.items()},
            "weight_decay": self.weight_decay[step],
            **self.parts.teacher.rates(step),
            "images_per_second": speed,
            "peak_memory_mb": self.parts.hardware.peak_memory_mb(),
        }
        record({"step": self.done, **{f"train/{name}": value for name, value in losses.items()}, **rates})
        bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
        if bar.disable and self.done % (10 * self.log_every) == 0:
            log.info("step %d of %d: loss %.4f, %.0f images/s", self.done, self.steps, losses["loss"], speed)

    def end_epoch(self, monitor: Monitor, checkpoints: Checkpointer, record: Callable[[dict[str, Any]], None]) -> None:
        """Measure, record and save at the end of an epoch (or of the run)."""
        self.check_finite()
        epoch, last = math.ceil(self.plan.epochs_done(self.done)), self.done == self.steps
        probe_now = monitor.probe is not None and (last or epoch % monitor.probe.every == 0)
        measured = monitor.epoch(probe_now) if self.parts.strategy.measures() else {}
        monitor.collapsed = self.world.broadcast_object(monitor.collapsed)
        means = {f"epoch/{name}": value for name, value in self.meter.epoch().items()}
        record({"step": self.done, "epoch": epoch, "seconds": self.seconds, **means, **measured})
        self.save(monitor, checkpoints, epoch, monitor.latest.get("linear") if probe_now else None)
        scores = ", ".join(
            f"{name} {monitor.latest[name]:.1%}" for name in ("linear", "knn") if probe_now and name in monitor.latest
        )
        held_out = f", held-out {measured['validation/loss']:.4f}" if "validation/loss" in measured else ""
        log.info("epoch %d: loss %.4f%s%s", epoch, means["epoch/loss"], held_out, scores and ", " + scores)
        if monitor.collapsed and self.stop_on_collapse:
            raise UserError(f"The run collapsed at step {self.done} ({monitor.collapsed}) and train.stop_on_collapse is set.")

    def check_finite(self) -> None:
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

    def save(self, monitor: Monitor, checkpoints: Checkpointer, epoch: int | None = None, score: float | None = None) -> None:
        """Save the whole state; never one that holds a loss that is not finite."""
        self.check_finite()
        state = self.state_dict() | {"watch": monitor.state_dict()}
        if self.world.main:
            checkpoints.save(state, epoch, score)

    def state_dict(self) -> State:
        """Everything needed to go on bit for bit."""
        return {
            "step": self.done,
            "processes": self.world.size,
            "seconds": self.seconds,
            **self.parts.strategy.state_dict(self.model, self.parts.optimizer),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a state."""
        if state["processes"] != self.world.size:
            log.warning("was run by %d processes, goes on with %d: the same up to rounding", state["processes"], self.world.size)
        self.done, self.seconds = state["step"], state["seconds"]
        self.parts.strategy.load_state_dict(self.model, self.parts.optimizer, state)
        self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])


def split(images: Tensor, masks: Masks, crops: Tensor | None, parts: int) -> Iterator[tuple[Tensor, Masks, Tensor | None]]:
    """A batch in equal parts of whole images."""
    yield from zip(
        images.chunk(parts), masks.split(parts), crops.chunk(parts) if crops is not None else [None] * parts, strict=True
    )
