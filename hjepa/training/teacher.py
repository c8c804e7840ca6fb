"""Teacher updates: how the target encoder follows the student, once per optimizer step and after the update.

To add one, write a subclass of `TeacherUpdate`, list it in `hjepa/training/__init__.pyi`, and add one YAML in conf/teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.types import PositiveFloat, PositiveInt
from hjepa.models.hjepa import HJEPA
from hjepa.models.pretrained import load_encoder, load_stacked_teachers
from hjepa.optim.schedules import Schedule
from hjepa.optim.step_plan import StepPlan


def parameter_pairs(model: HJEPA) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters of all teachers, and the corresponding parameters of their students in the same order."""
    teachers, students = zip(*model.teacher_student_pairs(), strict=True)
    return [p for t in teachers for p in t.parameters()], [p for s in students for p in s.parameters()]


def copy_buffers(model: HJEPA) -> None:
    """Give all teachers the buffers of their students, which are the statistics of batch norms."""
    teachers, students = (
        [b for m in modules for b in m.buffers()] for modules in zip(*model.teacher_student_pairs(), strict=True)
    )
    if teachers:
        torch._foreach_copy_(teachers, students)


class TeacherUpdate:
    """Base class of teacher updates. Unless `apply` is overridden, the teacher keeps the initial weights of the student."""

    shares_weights = False  # True if student and teacher are the same module
    never_changes = False  # True if the teacher is pretrained and frozen; the student is then probed and exported

    def attach(self, model: HJEPA) -> None:
        """Prepare the model's teacher, once, before its first step."""

    def prepare(self, plan: StepPlan) -> None:
        """Compute the schedule of the updates of a run."""

    def apply(self, model: HJEPA, step: int) -> None:
        """Update the model's teacher after optimizer step `step`."""

    def logged_values(self, step: int) -> dict[str, float]:
        """Return the values to log that change from step to step."""
        return {}


class EMA(TeacherUpdate):
    """Exponential moving average of the student (BYOL, Grill et al. 2020): teacher <- m * teacher + (1 - m) * student.

    Args:
        momentum: Schedule of m over optimizer steps.
        half_life: Number of steps in which half of the teacher is replaced, m = 2 ** (-1 / half_life); None uses `momentum`.
    """

    def __init__(self, momentum: Schedule, half_life: PositiveFloat | None = None) -> None:
        self.schedule, self.half_life = momentum, half_life
        self.momentum: Sequence[float] = ()

    def prepare(self, plan: StepPlan) -> None:
        self.momentum = [2 ** (-1 / self.half_life)] * plan.num_steps if self.half_life else self.schedule(plan)

    @torch.no_grad()
    def apply(self, model: HJEPA, step: int) -> None:
        teachers, students = parameter_pairs(model)
        torch._foreach_lerp_(teachers, students, 1.0 - self.momentum[step])
        copy_buffers(model)

    def logged_values(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum[step]}


class PeriodicCopy(TeacherUpdate):
    """A copy of the student that is renewed at intervals (Parallel JEPA).

    Args:
        epochs: Interval in epochs, or None.
        steps: Interval in optimizer steps, or None; exactly one of the two intervals is set.
    """

    def __init__(self, epochs: PositiveFloat | None, steps: PositiveInt | None) -> None:
        if (epochs is None) == (steps is None):
            raise UserError(f"teacher.epochs={epochs} and teacher.steps={steps}: set exactly one of them, the other to null.")
        self.epochs, self.steps = epochs, steps
        self.copy_after: set[int] = set()

    def prepare(self, plan: StepPlan) -> None:
        if self.steps:
            self.copy_after = set(range(self.steps, plan.num_steps + 1, self.steps))
        else:
            epochs = self.epochs or 1
            num_copies = int(plan.epochs_done(plan.num_steps) / epochs)
            self.copy_after = {max(1, plan.steps_in_first((i + 1) * epochs)) for i in range(num_copies)}

    @torch.no_grad()
    def apply(self, model: HJEPA, step: int) -> None:
        if step + 1 in self.copy_after:
            torch._foreach_copy_(*parameter_pairs(model))
            copy_buffers(model)


class Frozen(TeacherUpdate):
    """Pretrained weights that never change.

    Args:
        weights: Run folder, checkpoint of a run (the encoder that it evaluates is used), or checkpoint of timm or another
            trainer with the same architecture, which has no weights for stacked levels.
        weights_key: See `pretrained_key` of `hjepa.models.HJEPA`.
    """

    never_changes = True

    def __init__(self, weights: str, weights_key: str | None = None) -> None:
        self.weights, self.weights_key = weights, weights_key

    def attach(self, model: HJEPA) -> None:
        load_encoder(model.teacher, self.weights, "teacher.weights", self.weights_key)
        if model.upper:
            load_stacked_teachers(model, self.weights)


class SharedWeights(TeacherUpdate):
    """No separate teacher: the student computes the targets, and gradients flow through both sides.

    Without a regularizer or a contrastive loss, this collapses.
    """

    shares_weights = True

    def attach(self, model: HJEPA) -> None:
        model.share_teacher()
