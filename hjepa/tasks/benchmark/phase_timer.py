"""Where the time of a step goes: a clock whose phases follow one another, hung around the parts of an ordinary trainer.

Nothing in the trainer is there for it. On CUDA a mark is an event in the stream, read when all is over, so that measuring
never makes the host wait for the device; elsewhere it is the time once the device is idle.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hjepa.training.trainer import Trainer

# In the order of the data flow; `other` is what lies between the named ones.
PHASES = (
    *("data", "augment", "masks", "student", "teacher", "predictor", "stacked levels", "projector", "loss", "backward"),
    *("optimizer", "teacher update", "other"),
)

MODULES = {"student": "student", "teacher": "teacher", "predictor": "predictor", "upper": "stacked levels"}


class PhaseTimer:
    """Seconds by phase, round by round; a phase lasts until another one is entered."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds: list[list[tuple[str, Any]]] = []
        self.around: list[str] = []  # the phases that the present one lies in, outermost first

    def begin(self, phase: str) -> None:
        """Begin a round with a phase."""
        self.around = [phase]
        self.rounds.append([(phase, self.mark())])

    def enter(self, phase: str) -> None:
        """End the present phase and begin another in its place."""
        self.around[-1:] = [phase]
        self.rounds[-1].append((phase, self.mark()))

    def push(self, phase: str) -> None:
        """Begin a phase within the present one."""
        self.around.append(self.around[-1])
        self.enter(phase)

    def pop(self) -> None:
        """Go back to the phase that the present one lies in."""
        self.around.pop()
        self.enter(self.around[-1])

    def mark(self) -> Any:
        """A point in time: a CUDA event, or seconds."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def read(self) -> list[dict[str, float]]:
        """Seconds by phase of all rounds, which are then forgotten; waits for the device."""
        self.rounds.append([("", self.mark())])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        rounds = []
        for marks, following in pairwise(self.rounds):
            seconds: dict[str, float] = defaultdict(float)
            for (phase, start), (_, end) in pairwise([*marks, following[0]]):
                seconds[phase] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            rounds.append(dict(seconds))
        self.rounds = []
        return rounds

    def within(self, phase: str, call: Callable[..., Any], then: str | None = None) -> Any:
        """The call as a phase within whichever it is made in, or followed by the phase `then`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.push(phase)
            result = call(*args, **kwargs)
            self.pop()
            if then:
                self.enter(then)
            return result

        return timed


def attach_phase_timer(trainer: Trainer, clock: PhaseTimer) -> None:
    """Hang the clock around the parts of a step. Its rounds begin with the phase `augment`."""
    model, parts = trainer.model, trainer.parts
    trainer.pixels = clock.within("data", trainer.pixels)  # type: ignore[method-assign]
    model.register_forward_pre_hook(lambda *_: clock.enter("other"))
    modules = [(MODULES[name], part) for name, part in model.named_children() if name in MODULES]
    projectors = [("projector", part) for part in model.projectors.values() if not isinstance(part, nn.Identity)]
    for phase, module in modules + projectors:
        module.register_forward_pre_hook(lambda *_, phase=phase: clock.push(phase))
        module.register_forward_hook(lambda *_: clock.pop())
    trainer.parts = replace(
        parts,
        sampler=clock.within("masks", parts.sampler),
        objective=clock.within("loss", parts.objective, then="backward"),
    )
    unscale = trainer.scaler.unscale_

    def begin_update(*args: Any) -> Any:  # gradients are unscaled and clipped first
        clock.enter("optimizer")
        return unscale(*args)

    trainer.scaler.unscale_ = begin_update  # type: ignore[assignment, method-assign]
    parts.teacher.update = clock.within("teacher update", parts.teacher.update, then="other")  # type: ignore[method-assign]
