"""Teachers: how the target encoder follows the student. It moves once per optimizer step, after the update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.models.hjepa import HJEPA
from hjepa.models.pretrained import load_encoder, load_stacked_teachers
from hjepa.optim.schedules import Schedule
from hjepa.optim.step_plan import StepPlan


def parameters(model: HJEPA) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of all teachers, and those of their students in the same order."""
    teachers, students = zip(*model.teacher_student_pairs(), strict=True)
    return [p for t in teachers for p in t.parameters()], [p for s in students for p in s.parameters()]


class TeacherUpdate:
    """What the trainer asks of a teacher, which equals the student at the start of a run; this one never changes."""

    shares_weights = False  # True if the teacher is the student itself

    def attach(self, model: HJEPA) -> None:
        """Prepare the model's teacher, once, before its first step."""

    def plan(self, plan: StepPlan) -> None:
        """Lay out what it does over a run."""

    def update(self, model: HJEPA, step: int) -> None:
        """Move the model's teacher after optimizer step `step`."""

    def rates(self, step: int) -> dict[str, float]:
        """What of it changes over the run, for the record."""
        return {}


class EMA(TeacherUpdate):
    """Exponential moving average of the student (BYOL, Grill et al. 2020): teacher <- m * teacher + (1 - m) * student.

    Args:
        momentum: the schedule of m over optimizer steps.
        half_life: instead, the number of steps in which half of the teacher is replaced: m = 2 ** (-1 / half_life).
    """

    def __init__(self, momentum: Schedule, half_life: float | None = None) -> None:
        if half_life is not None and half_life <= 0:
            raise UserError(f"teacher.half_life={half_life}: expected a positive number of optimizer steps, or null.")
        self.schedule, self.half_life = momentum, half_life
        self.momentum: Sequence[float] = ()

    def plan(self, plan: StepPlan) -> None:
        constant = self.half_life and [2 ** (-1 / self.half_life)] * plan.steps
        self.momentum = constant or self.schedule(plan)

    @torch.no_grad()
    def update(self, model: HJEPA, step: int) -> None:
        teachers, students = parameters(model)
        torch._foreach_lerp_(teachers, students, 1.0 - self.momentum[step])

    def rates(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum[step]}


class PeriodicCopy(TeacherUpdate):
    """A copy of the student that is renewed at intervals (Parallel JEPA).

    Args:
        epochs, steps: the interval in epochs or in optimizer steps; the other one is None.
    """

    def __init__(self, epochs: float | None, steps: int | None) -> None:
        if (epochs is None) == (steps is None) or (epochs or steps or 0) <= 0:
            raise UserError(f"teacher.epochs={epochs} and teacher.steps={steps}: set one to a positive value, the other to null.")
        self.epochs, self.steps = epochs, steps
        self.due: set[int] = set()

    def plan(self, plan: StepPlan) -> None:
        if self.steps:
            self.due = set(range(self.steps, plan.steps + 1, self.steps))
        else:
            times = int(plan.epochs_done(plan.steps) / (self.epochs or 1))
            self.due = {max(1, plan.steps_in_first((i + 1) * (self.epochs or 1))) for i in range(times)}

    @torch.no_grad()
    def update(self, model: HJEPA, step: int) -> None:
        if step + 1 in self.due:
            torch._foreach_copy_(*parameters(model))


class Frozen(TeacherUpdate):
    """Given weights that never change.

    Args:
        weights: a run folder, a checkpoint of a run (its teacher), or a timm checkpoint file of the same architecture, which
            has nothing for stacked levels.
    """

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def attach(self, model: HJEPA) -> None:
        load_encoder(model.teacher, self.weights, "teacher.weights")
        if model.upper:
            load_stacked_teachers(model, self.weights)


class SharedWeights(TeacherUpdate):
    """No teacher: the student gives the targets itself, and gradients flow through both sides. Without a regularizer this
    collapses.
    """

    shares_weights = True

    def attach(self, model: HJEPA) -> None:
        model.share_teacher()
