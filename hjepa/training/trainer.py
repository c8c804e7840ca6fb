"""The training loop: `Trainer.train_step` is one optimizer step in the order of the data flow, `Trainer.fit` the whole run.

Schedules are applied before the update. The teacher follows after it, once per optimizer step, also with gradient accumulation.
Nothing in a step waits for the device: losses stay on the device until they are logged.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.contrib.logging import logging_redirect_tqdm

from hjepa.config.errors import UserError
from hjepa.config.terminal import progress_bar, shows_progress
from hjepa.config.types import NonNegativeInt, PositiveFloat, PositiveInt
from hjepa.data.image_files import ImageFiles
from hjepa.data.stream import Stream
from hjepa.data.workers import Interrupted
from hjepa.distributed.device import to_device
from hjepa.distributed.process_group import AsyncConsensus
from hjepa.distributed.seeding import generator, seed_global
from hjepa.optim.optimizers import check_components, set_hyperparameters
from hjepa.optim.step_plan import StepPlan
from hjepa.tracking.histograms import Histogram
from hjepa.training.batch import Batch
from hjepa.training.build import Components
from hjepa.training.checkpoint import Checkpointer, State
from hjepa.training.histograms import count_weights_and_gradients
from hjepa.training.meter import Meter, Terms
from hjepa.training.monitor import Monitor, Scores
from hjepa.training.parallel import full_tensor
from hjepa.training.signals import StopFlag, Stopped

log = logging.getLogger(__name__)

Recorder = Callable[[dict[str, Any]], None]


class Trainer:
    """Trains the student of a model on images.

    Args:
        components: Components of the run.
        images: Training images, uint8 [N, 3, S, S], or files of them.
        epochs: Length of the run in epochs, or None.
        steps: Length of the run in optimizer steps, or None; exactly one of the two lengths is set.
        batch_size: Images per optimizer step.
        batch_start: Batch size of the first epoch, or None for a constant one. The learning rate is scaled in proportion to the
            batch size (Goyal et al. 2017).
        batch_warmup: Number of epochs over which the batch size grows from `batch_start` to `batch_size`.
        accumulate: Number of equal parts in which a batch is computed to save memory.
        clip_norm: Maximum norm of the gradient; None for no clipping.
        log_every: Number of steps between two records of the losses.
        stop_on_collapse: Whether a collapse ends the run instead of only causing a warning.
        histograms: Number of epochs between calls of `record_histograms` with those of weights and gradients; None for no calls.
    """

    def __init__(
        self,
        components: Components,
        images: Tensor | ImageFiles,
        epochs: PositiveInt | None,
        steps: PositiveInt | None,
        batch_size: PositiveInt,
        batch_start: PositiveInt | None,
        batch_warmup: NonNegativeInt,
        accumulate: PositiveInt,
        clip_norm: PositiveFloat | None,
        log_every: PositiveInt,
        stop_on_collapse: bool,
        histograms: PositiveInt | None = None,
    ) -> None:
        self.components, self.world, self.model = components, components.world, components.model
        self.device, optimizer = components.hardware.device, components.optimizer
        divisor = accumulate * self.world.size
        self.plan = StepPlan(len(images), epochs, steps, batch_size, batch_start, batch_warmup, divisor)
        self.num_steps = self.plan.num_steps
        self.network = components.strategy.wrap(self.model, optimizer)
        self.accumulate, self.log_every, self.stop_on_collapse = accumulate, log_every, stop_on_collapse
        self.record_histograms: Callable[[int, dict[str, Histogram]], None] | None = None
        self.histogram_every = histograms if self.world.main else None
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        if isinstance(images, Tensor):
            self.images: Tensor | Stream = images.to(self.device)
        else:
            share = self.plan.batch_size // self.world.size
            self.images = Stream(images, self.indices, share, self.num_steps, self.device)
        check_components(components.schedule.parts, "schedule.parts", {group["part"] for group in optimizer.param_groups})
        self.learning_rates = components.schedule.learning_rates(self.plan)
        self.weight_decay = components.schedule.weight_decay(self.plan)
        components.teacher_update.prepare(self.plan)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.scaler = components.hardware.scaler()
        self.meter = Meter(self.world)
        self.order_epoch, self.order = -1, torch.empty(0)
        self.started, self.completed_steps, self.seconds = False, 0, 0.0

    # -- one step ------------------------------------------------------------------------------------------------------

    def get_batch(self, step: int, stop: object = False) -> Batch:
        """Return this process' share of the batch of a step.

        The images, their augmentation and their masks are functions of the seed and the step alone. Random numbers are sampled
        for the complete batch, so that they do not depend on the number of processes.

        Args:
            step: The step.
            stop: See `hjepa.data.stream.Stream.batch`.
        """
        seed, dataset, size = self.components.seed, self.components.dataset, self.plan.batch_size_at(step)
        params = dataset.sample_params(size, generator(seed, "augment", step))
        masks = self.components.sampler(size * dataset.views, generator(seed, "masks", step))
        rows = self.world.rows(size, self.accumulate)
        if rows is not None:
            crop_rows = rows.unsqueeze(1) * dataset.views + torch.arange(dataset.views)
            params, masks = params.select(rows), masks.select(crop_rows.flatten())
        crop_size = dataset.crop_size(step / self.num_steps)
        global_crops, local_crops, boxes = dataset.make_crops(self.load_images(step, stop), params, crop_size)
        return Batch(global_crops, masks.to(self.device), local_crops, boxes)

    def load_images(self, step: int, stop: object = False) -> Tensor:
        """Return this process' images of a step, uint8 [B, 3, S, S] on the device; see `get_batch`."""
        if isinstance(self.images, Stream):
            return self.images.batch(step, stop)
        return self.images[to_device(self.indices(step), self.device)]

    def indices(self, step: int) -> Tensor:
        """Return the indices of this process' images of a step.

        The batches of an epoch are consecutive parts of a random permutation of the images.
        """
        (epoch, start), size = self.plan.locate(step), self.plan.batch_size_at(step)
        if self.order_epoch != epoch:
            self.order_epoch = epoch
            self.order = torch.randperm(len(self.images), generator=generator(self.components.seed, "order", epoch))
        batch, rows = self.order[start : start + size], self.world.rows(size, self.accumulate)
        return batch if rows is None else batch[rows]

    def train_step(self, batch: Batch, step: int) -> Terms:
        """Take one optimizer step on a batch.

        Returns:
            The loss, its terms and the norm of the gradient as 0-d tensors on the device, by name.
        """
        c = self.components
        # Schedules come before the update: a warm-up from 0 leaves the weights of step 0 unchanged.
        rates = {component: values[step] for component, values in self.learning_rates.items()}
        set_hyperparameters(c.optimizer, rates, self.weight_decay[step])
        seed_global(c.seed, "step", step, *([] if self.world.main else [self.world.rank]))
        sums: Terms = {}
        for number, micro_batch in enumerate(batch.split(self.accumulate), start=1):
            # Only the last micro-batch averages the gradients over the processes.
            with nullcontext() if number == self.accumulate else c.strategy.no_sync(self.network):
                with c.hardware.autocast():
                    # The teacher computes targets from complete crops; the student encodes their contexts, from which the
                    # predictor predicts the targets.
                    output = self.network(*micro_batch, c.dataset.views)
                loss, terms = c.objective(output)  # in float32
                self.scaler.scale(loss / self.accumulate).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + value / self.accumulate if name in sums else value / self.accumulate
        self.scaler.unscale_(c.optimizer)
        norm = full_tensor(clip_grad_norm_(self.trainable, self.clip_norm))
        if self.scaler.is_enabled():  # gradients may overflow float16: the scaler then skips the update and lowers its scale
            norm = torch.where(norm.isfinite(), norm, 0)
        sums["gradient_norm"] = norm
        self.scaler.step(c.optimizer)
        self.scaler.update()
        if self.record_histograms and self.ends_epoch_with_histograms(step + 1):
            self.record_histograms(step + 1, count_weights_and_gradients(self.model))
        c.optimizer.zero_grad()
        # The teacher follows after the update, once per step.
        c.teacher_update.apply(self.model, step)
        return sums

    def ends_epoch_with_histograms(self, num_steps: int) -> bool:
        """Return whether the first `num_steps` steps end with an epoch whose histograms are recorded."""
        if self.histogram_every is None or num_steps not in self.plan.epoch_ends:
            return False
        return (self.plan.epoch_ends.index(num_steps) + 1) % self.histogram_every == 0 or num_steps == self.num_steps

    # -- the run -------------------------------------------------------------------------------------------------------

    def fit(self, monitor: Monitor, checkpointer: Checkpointer, record: Recorder, stop: StopFlag) -> None:
        """Train from the current state to the last step, and measure, record and save along the way.

        Args:
            monitor: Measures the weights at the start, and those at the end of every epoch.
            checkpointer: Saves the state.
            record: Called with every record of metrics.
            stop: Ends the training after the current step when it is set.

        Raises:
            Stopped: The process was asked to stop; the state has been saved.
            UserError: A loss was not finite, or the run collapsed and `stop_on_collapse` is set.
        """
        with logging_redirect_tqdm() if self.world.main and shows_progress() else nullcontext():  # log lines above the bars
            if not self.started:
                measured = monitor.measure_start() if self.components.strategy.measures() else {}
                record({"step": 0, "seconds": 0.0, **measured})
                self.save(monitor, checkpointer)
                self.world.broadcast_object(None)  # the others wait for the measurements, however long they take
            self.started = True
            self.check_collapse(monitor)  # of a run that this has ended before
            self.model.train()
            steps = {"total": self.num_steps, "initial": self.completed_steps, "unit": "step"}
            with progress_bar(**steps, disable=not self.world.main) as bar:
                self.run_steps(monitor, checkpointer, record, stop, bar)

    def run_steps(self, monitor: Monitor, checkpointer: Checkpointer, record: Recorder, stop: StopFlag, bar: Any) -> None:
        """Take the remaining steps; see `fit`."""
        consensus, logged_seconds, logged_steps = AsyncConsensus(self.world), self.seconds, self.completed_steps
        while self.completed_steps < self.num_steps:
            start = time.perf_counter()
            batch = self.next_batch(monitor, checkpointer, stop)
            self.meter.add(self.train_step(batch, self.completed_steps))
            self.completed_steps += 1
            bar.update()
            log_now = self.completed_steps % self.log_every == 0
            if log_now:
                self.check_finite()
                losses = self.meter.interval_means()
            self.seconds += time.perf_counter() - start
            if log_now:
                images = self.plan.images_seen(self.completed_steps) - self.plan.images_seen(logged_steps)
                self.log_metrics(losses, images / max(self.seconds - logged_seconds, 1e-9), record, bar)
                logged_seconds, logged_steps = self.seconds, self.completed_steps
            stopping, requeue, save_due = consensus(bool(stop), stop.requeue, checkpointer.due())
            if self.completed_steps in self.plan.epoch_ends:
                self.end_epoch(monitor, checkpointer, record)
            elif stopping or save_due:
                self.save(monitor, checkpointer)
                consensus.settle()
            if stopping and self.completed_steps < self.num_steps:
                stop.adopt(requeue)
                raise Stopped(f"stopped by signal {stop.number} at step {self.completed_steps} of {self.num_steps}")
        consensus.settle()

    def next_batch(self, monitor: Monitor, checkpointer: Checkpointer, stop: StopFlag) -> Batch:
        """Return the batch of the next step; save and stop instead if its images do not arrive after a stop signal."""
        try:
            return self.get_batch(self.completed_steps, stop)
        except Interrupted:
            if self.world.size > 1:  # the others may be in a step, so that all continue from the last checkpoint
                raise UserError(f"Stopped by signal {stop.number} while images did not arrive.") from None
            self.save(monitor, checkpointer)
            raise Stopped(f"stopped by signal {stop.number} at step {self.completed_steps} of {self.num_steps}") from None

    def log_metrics(self, losses: Scores, speed: float, record: Recorder, bar: Any) -> None:
        """Record the mean losses of a log interval, the hyperparameters of its last step, and the speed in images/s."""
        step = self.completed_steps - 1
        values = {
            **{f"lr/{name}" if name else "lr": rates[step] for name, rates in self.learning_rates.items()},
            "weight_decay": self.weight_decay[step],
            **self.components.teacher_update.logged_values(step),
            "images_per_second": speed,
            "peak_memory_mb": self.components.hardware.peak_memory_mb(),
        }
        record({"step": self.completed_steps, **{f"train/{name}": value for name, value in losses.items()}, **values})
        bar.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
        if bar.disable and self.completed_steps % (10 * self.log_every) == 0:
            log.info("step %d of %d: loss %.4f, %.0f images/s", self.completed_steps, self.num_steps, losses["loss"], speed)

    def end_epoch(self, monitor: Monitor, checkpointer: Checkpointer, record: Recorder) -> None:
        """Measure, record and save at the end of an epoch or of the run."""
        self.check_finite()
        epochs_done, last = self.plan.epochs_done(self.completed_steps), self.completed_steps == self.num_steps
        epoch, is_partial = math.ceil(epochs_done), not epochs_done.is_integer()  # the last epoch, which a longer run completes
        run_probe = monitor.probe is not None and (last or epoch % monitor.probe.every == 0)
        measured = monitor.measure_epoch(run_probe) if self.components.strategy.measures() else {}
        monitor.collapse = self.world.broadcast_object(monitor.collapse)
        means = {f"epoch/{name}": value for name, value in self.meter.epoch_means(keep=is_partial).items()}
        record({"step": self.completed_steps, "epoch": epoch, "seconds": self.seconds, **means, **measured})
        scores = monitor.latest_scores if run_probe else {}
        self.save(monitor, checkpointer, epoch, scores.get("linear"))
        held_out = f", held-out {measured['validation/loss']:.4f}" if "validation/loss" in measured else ""
        accuracies = "".join(f", {name} {scores[name]:.1%}" for name in ("linear", "knn") if name in scores)
        log.info("epoch %d: loss %.4f%s%s", epoch, means["epoch/loss"], held_out, accuracies)
        self.check_collapse(monitor)

    def check_collapse(self, monitor: Monitor) -> None:
        """Raise `UserError` if the last measurement found a collapse and `stop_on_collapse` is set."""
        if monitor.collapse and self.stop_on_collapse:
            raise UserError(
                f"The run collapsed at step {self.completed_steps} ({monitor.collapse}), and train.stop_on_collapse=true ends "
                "it; change the options that cause it, such as optimizer.lr or the regularizer, which starts a new run."
            )

    def check_finite(self) -> None:
        """Raise `UserError`, naming the images of the batch, if a loss or gradient since the last log was not finite."""
        steps_ago = self.meter.steps_since_nonfinite()
        if steps_ago is not None:
            step = self.completed_steps - 1 - steps_ago
            raise UserError(
                f"The loss or gradient of step {step} is not finite. The indices of its images among the training images are "
                f"{self.indices(step).tolist()}. The last good state is checkpoints/latest.pt; lower optimizer.lr or set "
                "train.clip_norm."
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise UserError(
                f"hardware.precision=float16: the gradients overflow even at a loss scale of {self.scaler.get_scale():g}; use "
                "bfloat16 or float32, or lower optimizer.lr."
            )

    def close(self) -> None:
        """Shut down the worker processes that decode images."""
        if isinstance(self.images, Stream):
            self.images.close()

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self, monitor: Monitor, checkpointer: Checkpointer, epoch: int | None = None, score: float | None = None) -> None:
        """Save a checkpoint unless a loss was not finite; see `Checkpointer.save`."""
        self.check_finite()
        checkpointer.save(self, monitor, epoch, score)

    def state_dict(self) -> State:
        """Return everything that is needed to continue bit for bit."""
        return {
            "step": self.completed_steps,
            "processes": self.world.size,
            "seconds": self.seconds,
            **self.components.strategy.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore a state returned by `state_dict`."""
        if state["processes"] != self.world.size:
            log.warning(
                "the run started with %d processes and continues with %d; its results are the same up to rounding",
                *(state["processes"], self.world.size),
            )
        self.started, self.completed_steps, self.seconds = True, state["step"], state["seconds"]
        self.components.strategy.load_state_dict(state)
        self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])
