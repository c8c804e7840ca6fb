"""A timer of the phases of a training step, attached to an ordinary trainer from outside.

The trainer contains no code for it. On CUDA a timestamp is an event in the stream, which is read after the last step, so that
timing never makes the host wait for the device. Elsewhere a timestamp is taken when the device is idle.
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

# Phases in the order of the data flow; `other` is the time between the named ones.
PHASES = (
    *("data", "augment", "masks", "student", "teacher", "predictor", "stacked levels", "projector", "loss", "backward"),
    *("optimizer", "teacher update", "other"),
)

MODULE_PHASES = {
    "student": "student",
    "teacher": "teacher",
    "predictor": "predictor",
    "matching": "predictor",
    "upper": "stacked levels",
}


class PhaseTimer:
    """Measures the seconds of every phase in rounds; a phase lasts until another one is entered.

    Args:
        device: Device that computes the phases.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rounds: list[list[tuple[str, Any]]] = []
        self.stack: list[str] = []  # the current phase last, preceded by the phases that it interrupted

    def start_round(self, phase: str) -> None:
        """Start a round, which begins with a phase."""
        self.stack = [phase]
        self.rounds.append([(phase, self.timestamp())])

    def enter(self, phase: str) -> None:
        """Replace the current phase."""
        self.stack[-1:] = [phase]
        self.rounds[-1].append((phase, self.timestamp()))

    def push(self, phase: str) -> None:
        """Interrupt the current phase with another one."""
        self.stack.append(self.stack[-1])
        self.enter(phase)

    def pop(self) -> None:
        """Return to the phase that the current one has interrupted."""
        self.stack.pop()
        self.enter(self.stack[-1])

    def timestamp(self) -> Any:
        """Return the current time as a CUDA event or in seconds."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def read(self) -> list[dict[str, float]]:
        """Wait for the device, return the seconds by phase of all rounds, and forget the rounds."""
        self.rounds.append([("", self.timestamp())])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        rounds = []
        for entries, following in pairwise(self.rounds):
            seconds: dict[str, float] = defaultdict(float)
            for (phase, start), (_, end) in pairwise([*entries, following[0]]):
                seconds[phase] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            rounds.append(dict(seconds))
        self.rounds = []
        return rounds

    def wrap(self, phase: str, function: Callable[..., Any], next_phase: str | None = None) -> Any:
        """Return the function timed as a phase that interrupts the current one.

        Args:
            phase: Phase of the function.
            function: Function to time.
            next_phase: Phase to enter when the function returns; None returns to the interrupted phase.
        """

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.push(phase)
            result = function(*args, **kwargs)
            self.pop()
            if next_phase:
                self.enter(next_phase)
            return result

        return timed


def attach_phase_timer(trainer: Trainer, timer: PhaseTimer) -> None:
    """Attach a timer to the modules and components of a trainer; every round has to start with the phase `augment`."""
    model, components = trainer.model, trainer.components
    trainer.load_images = timer.wrap("data", trainer.load_images)  # type: ignore[method-assign]
    model.register_forward_pre_hook(lambda *_: timer.enter("other"))
    modules = [(MODULE_PHASES[name], module) for name, module in model.named_children() if name in MODULE_PHASES]
    heads = {module for heads in (model.student_heads, model.teacher_heads) for module in heads.values()}
    named = [*model.projectors.values(), *heads]
    projectors = [("projector", module) for module in named if not isinstance(module, nn.Identity)]
    for phase, module in modules + projectors:
        module.register_forward_pre_hook(lambda *_, phase=phase: timer.push(phase))
        module.register_forward_hook(lambda *_: timer.pop())
    trainer.components = replace(
        components,
        sampler=timer.wrap("masks", components.sampler),
        objective=timer.wrap("loss", components.objective, next_phase="backward"),
    )
    unscale = trainer.scaler.unscale_

    def unscale_in_optimizer_phase(*args: Any) -> Any:  # unscaling and clipping come first in the update
        timer.enter("optimizer")
        return unscale(*args)

    trainer.scaler.unscale_ = unscale_in_optimizer_phase  # type: ignore[assignment, method-assign]
    update = components.teacher_update
    update.apply = timer.wrap("teacher update", update.apply, next_phase="other")  # type: ignore[method-assign]
