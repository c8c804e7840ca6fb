"""What tracking, checkpoints and signal checks cost a training step: `python -m benchmarks.overhead [key=value ...]`.

Steps of the default experiment are timed with these around them, each part on its own: the time of the calls in the training
thread, and, as it is taken from training on a machine whose cores are all in use, the CPU time of the tracker's thread.
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


class PhaseTimer:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, owner: Any, name: str, what: str, now: Callable[[], float] = time.perf_counter) -> None:
        """Time a method of an object or class from now on."""
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[what] += now() - began

        setattr(owner, name, timed)


def main(*overrides: str) -> None:
    """Run, and print the shares."""
    from hjepa.tasks.train import TrainingRun
    from hjepa.training.signals import StopFlag

    with tempfile.TemporaryDirectory() as root:
        config = resolve(compose("probe=none", "tracking=mlflow", f"output_root={root}", *overrides))
        check(config)
        session = TrainingRun(config, RunFolder(Path(root) / "r", config))
        clock, trainer = PhaseTimer(), session.trainer
        clock.around(trainer, "step", "steps")
        clock.around(trainer, "batch", "steps")
        clock.around(session, "record", "records and tracking")
        clock.around(trainer, "save", "checkpoints")
        clock.around(StopFlag, "__bool__", "signal checks")
        clock.around(session.tracker.members["mlflow"], "send", "the tracker's thread (CPU)", time.thread_time)
        session.run()
    whole = clock.seconds.pop("steps")
    print(f"{trainer.num_steps} steps, {1000 * whole / trainer.num_steps:.1f} ms each")
    for what, seconds in clock.seconds.items():
        print(f"{what:<30}{1000 * seconds / trainer.num_steps:8.3f} ms a step {seconds / whole:8.3%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
