"""One sitting of a training run: from the claimed folder to the summary, whatever happens in between."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from hjepa.config.errors import UserError, explain_machine_error
from hjepa.config.identity import config_hash, flatten, identity
from hjepa.config.instantiate import build, build_or_none
from hjepa.config.schema import Config
from hjepa.data.datamodule import spaced
from hjepa.distributed.launch import launch
from hjepa.distributed.seeding import generator
from hjepa.plotting import plot_curves, plot_masks
from hjepa.tracking.provenance import origin
from hjepa.tracking.run_folder import UNSENT_MARKER, Record, RunFolder
from hjepa.tracking.tracker import TRACKER_STATUS, build_trackers
from hjepa.training.build import Components, build_components
from hjepa.training.checkpoint import Checkpointer
from hjepa.training.monitor import Monitor
from hjepa.training.signals import StopFlag, Stopped
from hjepa.training.summary import build_summary, print_summary
from hjepa.training.trainer import Trainer

log = logging.getLogger("hjepa")


class TrainingRun:
    """Builds the parts and the data (nothing is written yet), then runs.

    Args:
        config: resolved and checked; folder: not claimed yet.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.tracker = build_trackers(config["tracking"])
        self.parts: Components = build_components(config)
        self.checkpoints: Checkpointer = build(config["checkpoint"])
        self.probe = build_or_none(config["probe"])
        train, validation = self.parts.dataset.train_and_validation()
        self.preview = validation.images[spaced(len(validation), 4)]
        self.records: list[Record] = []
        self.run_id: str | None = None
        p = self.parts
        self.trainer: Trainer = build(config["train"], parts=p, images=train.images)
        self.monitor = Monitor(p.model, p.hardware, p.dataset, p.sampler, p.objective.loss, self.probe, train, validation)

    def run(self) -> float | None:
        """Train to the end; returns the linear probe's accuracy, None without probes (and in all but the main process)."""
        if not self.parts.world.main:
            self.follow()
            return None
        self.folder.claim(self.config["overwrite"])
        with self.logging(), StopFlag() as stop, self.outcome(stop), contextlib.closing(self.trainer):
            self.resume()
            self.start_tracking()
            self.describe()
            self.trainer.fit(self.monitor, self.checkpoints, self.record, stop)
        return self.monitor.latest.get("linear")

    def follow(self) -> None:
        """Compute this process' share of a run that the main process measures and records."""
        with StopFlag() as stop, contextlib.closing(self.trainer):
            self.load()
            with contextlib.suppress(Stopped):
                self.trainer.fit(self.monitor, self.checkpoints, lambda record: None, stop)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Copy what is said to run.log, for this run only."""
        handler, root = self.folder.log_handler(), logging.getLogger()
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            handler.close()
            self.folder.release()

    @contextlib.contextmanager
    def outcome(self, stop: StopFlag) -> Iterator[None]:
        """Whatever ends the run is written to summary.json and told to the tracker."""
        try:
            yield
        except (Stopped, KeyboardInterrupt) as reason:
            status = "requeued" if stop.requeue else "stopped"
            self.finish(status, str(reason) or "interrupted", TRACKER_STATUS[status])
            print(f"Stopped ({reason}). The same command continues this run.", file=sys.stderr, flush=True)
            try:
                stop.leave()
            except Exception as error:
                self.finish("failed", f"{type(error).__name__}: {error}", "FAILED")
                raise
            raise SystemExit(130) from None
        except BaseException as error:
            collapsed = self.monitor.collapsed and isinstance(error, UserError)
            why = explain_machine_error(error) or error
            try:
                self.finish("collapsed" if collapsed else "failed", f"{type(why).__name__}: {why}", "FAILED")
            except Exception as another:  # the first one is the reason
                log.warning("the end of the run could not be written down (%s)", another)
            raise
        self.finish("collapsed" if self.monitor.collapsed else "finished", self.monitor.collapsed, "FINISHED")

    def resume(self) -> None:
        """Go on from the latest checkpoint, if any; metrics after it will be written again."""
        self.checkpoints.clean(self.folder.path / "checkpoints")
        resumed = self.load()
        if resumed:
            log.info("resuming at step %d of %d", self.trainer.done, self.trainer.steps)
        self.records = self.folder.rewind(self.trainer.done if resumed else -1)

    def load(self) -> bool:
        """Load the latest checkpoint, in all processes once the main one has claimed the folder; whether there was one."""
        self.parts.world.broadcast_object(None)
        self.checkpoints.open(self.folder.path / "checkpoints", identity(self.config))
        state = self.checkpoints.load(self.parts.hardware.device)
        if state:
            self.trainer.load_state_dict(state)
            self.monitor.load_state_dict(state["watch"])
        return bool(state)

    def start_tracking(self) -> None:
        """Start or resume the tracked run and send it what it lacks."""
        counts = self.parts.model.parameter_counts()
        if self.config["tracking"]:
            self.folder.mark_unsent()
        self.run_id = self.tracker.start(
            self.folder.path,
            self.config["experiment_name"],
            {**flatten(self.config), **flatten(counts, "parameters")},
            origin() | {"config": config_hash(self.config)},
            self.records,
        )
        self.tracker.artifact(self.folder.path / "config.yaml")

    def describe(self) -> None:
        """Say what is about to run, and draw its masks."""
        p, counts = self.parts, self.parts.model.parameter_counts()
        log.info("run folder %s", self.folder.path)
        log.info("%s; parameters: %s", p.hardware.describe(), ", ".join(f"{k} {v:,}" for k, v in counts.items()))
        plan = self.trainer.plan
        log.info("%d steps of %d images, %d to an epoch", plan.steps, plan.batch_size, plan.steps_in_epoch(plan.batch_warmup))
        masks = p.sampler(len(self.preview), generator(p.seed, "preview"))
        picture = self.folder.path / "plots" / "masks.png"
        plot_masks(self.preview / 255, masks, p.model, picture)
        self.tracker.artifact(picture, "plots")

    def record(self, record: Record) -> None:
        """Write a record to the run folder and send it to the tracker."""
        self.records.append(record)
        self.folder.append(record)
        self.tracker.log(record)

    def finish(self, status: str, reason: str | None, tracked_status: str) -> None:
        """Write the summary and the curves, tell the tracker; after a whole run, tell the user."""
        summary = build_summary(self.config, self.parts, self.trainer, self.monitor, self.records, self.run_id)
        summary |= {"status": status, "reason": reason}
        curves = self.folder.path / "plots" / "curves.png"
        try:
            plot_curves(self.records, curves)
        finally:  # the summary comes last, since it says that the run is complete
            self.folder.write_summary(summary)
        self.tracker.artifact(curves, "plots")
        self.tracker.artifact(self.folder.path / "summary.json")
        if self.tracker.finish(tracked_status):
            self.folder.mark_sent()
        if tracked_status == "FINISHED":
            print_summary(summary, self.folder.path, self.tracker.view_command())


def train_model(config: Config, path: Path) -> float | None:
    """Train; the same config again resumes an unfinished run and shows a finished one's result.

    Returns:
        The linear probe's accuracy (None without probes).
    """
    folder = RunFolder(path, config)
    if done := folder.result():
        from hjepa.training.summary import print_summary

        print("This run is finished. To run it anew: overwrite=true, another name or another seed.")
        if config["tracking"] and (path / UNSENT_MARKER).exists():  # it was killed, or a server was away, at the very end
            from hjepa.tracking.resend import send

            send(config, path)
        print_summary(done, folder.path, None)
        return done["probe"].get("linear")
    return launch(train_here, config, path)


def train_here(config: Config, path: Path) -> float | None:
    """Train in this process, alone or as one of several."""
    from hjepa.distributed.process_group import destroy_process_group

    pass

    try:
        return TrainingRun(config, RunFolder(path, config)).run()
    finally:
        destroy_process_group()
