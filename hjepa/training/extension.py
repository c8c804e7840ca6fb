"""What it means for a run to be made longer: whether its steps so far are those of a run of the new length."""

from dataclasses import replace
from typing import Any

from hjepa.config.schema import Config
from hjepa.optim.step_plan import StepPlan
from hjepa.training.trainer import Trainer


def describe_extension(trainer: Trainer, saved: Config) -> str | None:
    """Say how a run goes on that is longer than it was when its checkpoint was saved; None if it is not longer.

    Args:
        trainer: Trainer of the longer run, which has loaded the checkpoint.
        saved: Identity of the run that the checkpoint holds (see `hjepa.config.identity`).
    """
    plan, done = trainer.plan, trainer.completed_steps
    earlier = replace(plan, epochs=saved["train"]["epochs"], length=saved["train"]["steps"])
    if earlier == plan:
        return None
    how = f"the run is made longer, from {earlier.num_steps} to {plan.num_steps} steps"
    if schedule_values(trainer, earlier, done) == schedule_values(trainer, plan, done):
        return (
            f"{how}: its schedules of the {done} steps so far are the same, so it is the run that had this length from the start"
        )
    lr = next(iter(trainer.learning_rates.values()))
    before = next(iter(trainer.components.schedule.learning_rates(earlier).values()))
    return (
        f"{how}: from step {done} on, its schedules are those of the new length (learning rate {before[done - 1]:.3g} -> "
        f"{lr[done]:.3g}); those of its steps so far were others, so it is not the run that had this length from the start"
    )


def schedule_values(trainer: Trainer, plan: StepPlan, num_steps: int) -> list[Any]:
    """Return everything that schedules set in the first steps of a run."""
    c, teacher = trainer.components, trainer.components.teacher_update
    teacher.prepare(plan)
    values = [
        *(rates[:num_steps] for rates in c.schedule.learning_rates(plan).values()),
        c.schedule.weight_decay(plan)[:num_steps],
        [teacher.logged_values(step) for step in range(num_steps)],
        [c.dataset.crop_size(step / plan.num_steps) for step in range(num_steps)],
    ]
    teacher.prepare(trainer.plan)
    return values
