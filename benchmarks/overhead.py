"""Measure what tracking, checkpoints and signal checks add to a training step: `python -m benchmarks.overhead [key=value ...]`.

The benchmark runs the default experiment and times the methods around its steps: the time of the calls in the training thread,
and the CPU time of the tracker's thread, which slows training down on a machine whose cores are all in use.
"""

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hjepa.config.schema import check, resolve
from hjepa.tracking.run_folder import RunFolder
from tests.helpers.runs import compose


class MethodTimer:
    """Seconds spent in methods, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def attach(self, owner: Any, method: str, label: str, clock: Callable[[], float] = time.perf_counter) -> None:
        """Time a method of an object or class from now on."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[label] += clock() - start

        setattr(owner, method, timed)


def main(*overrides: str) -> None:
    """Run the experiment and print the fractions of the step time."""
    from hjepa.tasks.train import TrainingRun
    from hjepa.training.signals import StopFlag

    with tempfile.TemporaryDirectory() as root:
        config = resolve(compose("probe=none", "tracking=mlflow", f"output_root={root}", *overrides))
        check(config)
        run = TrainingRun(config, RunFolder(Path(root) / "r", config))
        timer, trainer = MethodTimer(), run.trainer
        timer.attach(trainer, "get_batch", "steps")
        timer.attach(trainer, "train_step", "steps")
        timer.attach(run, "record", "records and tracking")
        timer.attach(trainer, "save", "checkpoints")
        timer.attach(StopFlag, "__bool__", "signal checks")
        timer.attach(run.tracker.members["mlflow"], "send", "the tracker's thread (CPU)", time.thread_time)
        run.run()
    total = timer.seconds.pop("steps")
    print(f"{trainer.num_steps} steps, {1000 * total / trainer.num_steps:.1f} ms each")
    for label, seconds in timer.seconds.items():
        print(f"{label:<30}{1000 * seconds / trainer.num_steps:8.3f} ms per step {seconds / total:8.3%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
