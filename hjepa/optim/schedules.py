"""Schedules of learning rates, weight decay and EMA momentum, as lists indexed by optimizer step.

Each schedule warms up linearly from 0 over its first steps (`warmup_ratio`, `warmup_epochs` or `warmup_steps`) and then goes from
`start` to `end`. The value of step t is set before update t. To add a schedule, write a subclass of `Schedule` with `progress`,
list it in `hjepa/optim/__init__.pyi`, and add one YAML in conf/schedule.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from hjepa.config.errors import UserError
from hjepa.config.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFraction
from hjepa.optim.step_plan import StepPlan


@dataclass(frozen=True)
class Schedule(ABC):
    """Base class of schedules; a subclass defines the shape of the curve after the warm-up.

    Args:
        start: Value after the warm-up.
        end: Value at the last step.
        warmup_ratio: Length of the linear warm-up from 0 as a fraction of all optimizer steps.
        warmup_epochs: Length of the warm-up in epochs, which replaces the fraction.
        warmup_steps: Length of the warm-up in optimizer steps, which replaces the fraction too.
    """

    start: NonNegativeFloat
    end: NonNegativeFloat
    warmup_ratio: Fraction = 0.0
    warmup_epochs: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        if self.warmup_epochs and self.warmup_steps is not None:
            raise UserError(
                f"warmup_epochs={self.warmup_epochs} and warmup_steps={self.warmup_steps} exclude each other; set one to null."
            )

    @abstractmethod
    def progress(self, fraction: float) -> float:
        """Return how far the value has moved from `start` (0) to `end` (1) after a fraction of the steps."""

    def __call__(self, plan: StepPlan) -> list[float]:
        """Return the value at each of the plan's optimizer steps."""
        num_warmup = self.num_warmup(plan)
        num_rest = plan.num_steps - num_warmup
        warmup = [self.start * step / num_warmup for step in range(num_warmup)]
        fractions = [step / max(1, num_rest - 1) for step in range(num_rest)]
        return warmup + [self.start + (self.end - self.start) * self.progress(fraction) for fraction in fractions]

    def num_warmup(self, plan: StepPlan) -> int:
        """Return the number of steps of the warm-up."""
        if self.warmup_epochs is None and self.warmup_steps is None:
            return round(self.warmup_ratio * plan.num_steps)
        return min(plan.num_steps, self.warmup_steps or plan.steps_in_first(self.warmup_epochs or 0.0))


class CosineSchedule(Schedule):
    """Half a cosine from `start` to `end` (SGDR, Loshchilov & Hutter 2017)."""

    def progress(self, fraction: float) -> float:
        return (1 - math.cos(math.pi * fraction)) / 2


class LinearSchedule(Schedule):
    """A straight line from `start` to `end`."""

    def progress(self, fraction: float) -> float:
        return fraction


class ConstantSchedule(Schedule):
    """The value `start` throughout; `end` has no effect."""

    def progress(self, fraction: float) -> float:
        return 0.0


@dataclass(frozen=True)
class WSDSchedule(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024): the value `start`, then a straight line to `end`.

    Args:
        decay: Fraction of the steps after the warm-up over which the value decays.
    """

    decay: PositiveFraction = 0.2

    def progress(self, fraction: float) -> float:
        return max(0.0, (fraction - (1 - self.decay)) / self.decay)


@dataclass(frozen=True)
class OptimizerSchedules:
    """Schedules of the optimizer's learning rates and weight decay.

    Args:
        lr: Schedule of the learning rate.
        weight_decay: Schedule of the weight decay of matrices.
        parts: Learning-rate schedules of single components (student, predictor, stacked1, ...) that replace `lr`.
    """

    lr: Schedule
    weight_decay: Schedule
    parts: dict[str, Schedule] = field(default_factory=dict)

    def learning_rates(self, plan: StepPlan) -> dict[str, list[float]]:
        """Return the learning rate of every step by component, in proportion to the step's batch size (Goyal et al. 2017).

        The key "" holds the rates of all components that have no schedule of their own.
        """
        factors = [plan.batch_size_at(step) / plan.batch_size for step in range(plan.num_steps)]
        schedules = {"": self.lr} | self.parts
        return {name: [f * lr for f, lr in zip(factors, s(plan), strict=True)] for name, s in schedules.items()}
