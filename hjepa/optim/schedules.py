"""Schedules as lists indexed by optimizer step: learning rates, weight decay, EMA momentum.

Each schedule warms up linearly from 0 over its first steps (`warmup_epochs` or `warmup_steps`) and then goes from `start` to
`end`. The value of step t is applied before update t.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from hjepa.config.errors import UserError
from hjepa.optim.step_plan import StepPlan


@dataclass(frozen=True)
class Schedule(ABC):
    """Shape of a value over a run; subclasses say how far it has come after a share of the way.

    Args:
        start, end: the value after the warm-up and at the last step.
        warmup_epochs, warmup_steps: length of the linear warm-up from 0; only one of the two may be set.
    """

    start: float
    end: float
    warmup_epochs: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_epochs and self.warmup_steps:
            raise UserError(
                f"warmup_epochs={self.warmup_epochs} and warmup_steps={self.warmup_steps} exclude each other; set one to 0."
            )
        if self.warmup_epochs < 0 or self.warmup_steps < 0:
            raise UserError(f"A warm-up of {self.warmup_epochs} epochs, {self.warmup_steps} steps cannot be negative.")

    @abstractmethod
    def progress(self, share: float) -> float:
        """How far from `start` (0) to `end` (1) the value is after `share` of the way."""

    def __call__(self, plan: StepPlan) -> list[float]:
        """The value of each of the plan's optimizer steps."""
        warmup = min(plan.steps, self.warmup_steps or plan.steps_in_first(self.warmup_epochs))
        rest = plan.steps - warmup
        rise = [self.start * step / warmup for step in range(warmup)]
        way = max(1, rest - 1)
        return rise + [self.start + (self.end - self.start) * self.progress(step / way) for step in range(rest)]


class CosineSchedule(Schedule):
    """Half a cosine (SGDR, Loshchilov & Hutter 2017)."""

    def progress(self, share: float) -> float:
        return (1 - math.cos(math.pi * share)) / 2


class LinearSchedule(Schedule):
    """A straight line."""

    def progress(self, share: float) -> float:
        return share


class ConstantSchedule(Schedule):
    """`start` all the way; `end` is not reached."""

    def progress(self, share: float) -> float:
        return 0.0


@dataclass(frozen=True)
class WSDSchedule(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024): `start` all the way, then a straight line to `end`.

    Args:
        decay: share of the way, after the warm-up, that the line takes.
    """

    decay: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise UserError(f"schedule: decay={self.decay} is a share of the run; expected a value in (0, 1].")

    def progress(self, share: float) -> float:
        return max(0.0, (share - (1 - self.decay)) / self.decay)


@dataclass(frozen=True)
class OptimizerSchedules:
    """The schedules that the optimizer follows.

    Args:
        lr: learning rate; weight_decay: of the matrices.
        parts: learning rates of single parts instead, by name: student, predictor, stacked1, ...
    """

    lr: Schedule
    weight_decay: Schedule
    parts: dict[str, Schedule] = field(default_factory=dict)

    def learning_rates(self, plan: StepPlan) -> dict[str, list[float]]:
        """The learning rate of every step by part, "" for all that have none of their own; in proportion to the step's batch
        (Goyal et al. 2017).
        """
        schedules = {"": self.lr} | self.parts
        sizes = [plan.batch_size_at(step) / plan.batch_size for step in range(plan.steps)]
        return {part: [size * lr for size, lr in zip(sizes, s(plan), strict=True)] for part, s in schedules.items()}
