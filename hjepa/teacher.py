"""Teachers: how the target encoder follows the student. It moves once per optimizer step, after the update."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hjepa.schedules import Schedule


class EMA:
    """Exponential moving average of the student (BYOL, Grill et al. 2020): teacher <- m * teacher + (1 - m) * student.

    Args:
        momentum: the schedule of m over optimizer steps.
    """

    def __init__(self, momentum: Schedule) -> None:
        self.schedule = momentum
        self.momentum: Sequence[float] = ()

    def plan(self, steps: int, steps_per_epoch: int) -> None:
        """Lay out the momentum for a run of `steps` optimizer steps."""
        self.momentum = self.schedule(steps, steps_per_epoch)

    @torch.no_grad()
    def update(self, teacher: nn.Module, student: nn.Module, step: int) -> None:
        """Move the teacher towards the student after optimizer step `step`."""
        targets: list[Tensor] = list(teacher.parameters())
        torch._foreach_lerp_(targets, list(student.parameters()), 1.0 - self.momentum[step])
