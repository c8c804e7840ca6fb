"""`task=train`: one session of a training run, from the claimed run folder to its summary."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from hjepa.config.errors import UserError, explain_machine_error
from hjepa.config.identity import config_hash, flatten, identity
from hjepa.config.instantiate import build, build_or_none
from hjepa.config.passwords import hide_passwords
from hjepa.config.schema import Config
from hjepa.data.checks import check_images_differ
from hjepa.data.datamodule import evenly_spaced_indices
from hjepa.distributed.launch import launch
from hjepa.distributed.process_group import destroy_process_group
from hjepa.plotting import plot_curves
from hjepa.tracking.histograms import Histogram, histogram_files, write_histograms
from hjepa.tracking.provenance import provenance_tags
from hjepa.tracking.resend import send_idle_run, send_run
from hjepa.tracking.run_folder import UNSENT_MARKER, Record, RunFolder
from hjepa.tracking.tracker import TRACKER_STATUS, build_trackers
from hjepa.training.build import build_components, build_untrained
from hjepa.training.checkpoint import Checkpointer
from hjepa.training.extension import describe_extension
from hjepa.training.monitor import Monitor
from hjepa.training.preview import plot_preview
from hjepa.training.signals import StopFlag, Stopped
from hjepa.training.summary import build_summary, print_summary
from hjepa.training.trainer import Trainer

log = logging.getLogger("hjepa")


def train_model(config: Config, path: Path) -> float | None:
    """Train; the same config again resumes an unfinished run and shows the result of a finished one.

    Returns:
        The accuracy of the linear probe, or None without probes.
    """
    if config["tracking"].get("mlflow", {}).get("register"):
        raise UserError("tracking.mlflow.register belongs to task=export, which exports what is registered; leave it out here.")
    folder = RunFolder(path, config)
    summary = folder.finished_summary()
    if not summary:
        return launch(train_in_this_process, config, path)
    print("This run is finished. To run it again: overwrite=true, another name or another seed.")
    if config["tracking"] and (path / UNSENT_MARKER).exists():  # the trackers missed the end of the run
        send_run(config, path)
    print_summary(summary, folder.path, None)
    return summary["probe"].get("linear")


def train_in_this_process(config: Config, path: Path) -> float | None:
    """Train in this process, alone or as one of several."""
    try:
        return TrainingRun(config, RunFolder(path, config)).run()
    finally:
        destroy_process_group()


class TrainingRun:
    """A session of a training run; the constructor builds the components and loads the data, but writes nothing.

    Args:
        config: Resolved and checked config.
        folder: Run folder, not claimed yet.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.tracker = build_trackers(config["tracking"])
        self.components = build_components(config)
        train, validation = self.components.dataset.train_and_validation()
        check_images_differ(train, validation)
        self.preview = validation.images[evenly_spaced_indices(len(validation), 4)]
        self.trainer: Trainer = build(config["train"], components=self.components, images=train.epoch_images)
        untrained = build_untrained(config, self.components.hardware.device)
        self.monitor = Monitor(self.components, build_or_none(config["probe"]), train, validation, untrained)
        self.checkpointer: Checkpointer = build(config["checkpoint"])
        self.checkpointer.attach(folder.path / "checkpoints", identity(config), self.components.world)
        self.trainer.record_histograms = self.record_histograms
        self.records: list[Record] = []
        self.tags = {"config": config_hash(config)}
        self.run_id: str | None = None

    def run(self) -> float | None:
        """Train to the end.

        Returns:
            The accuracy of the linear probe; None without probes and in all processes but the main one.
        """
        if not self.components.world.main:
            self.run_as_worker()
            return None
        self.folder.claim(self.config["overwrite"] and not self.folder.was_emptied_by_this_job())
        with self.logging(), StopFlag() as stop, self.writing_summary(stop), contextlib.closing(self.trainer):
            self.resume()
            self.start_tracking()
            self.log_description()
            self.trainer.fit(self.monitor, self.checkpointer, self.record, stop)
        return self.monitor.latest_scores.get("linear")

    def run_as_worker(self) -> None:
        """Compute this process' share of a run that the main process measures and records."""
        with StopFlag() as stop, contextlib.closing(self.trainer):
            self.load_checkpoint()
            with contextlib.suppress(Stopped):
                self.trainer.fit(self.monitor, self.checkpointer, lambda record: None, stop)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Copy log lines to run.log, and release the run folder at the end."""
        handler, root = self.folder.log_handler(), logging.getLogger()
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            handler.close()
            self.folder.release()

    @contextlib.contextmanager
    def writing_summary(self, stop: StopFlag) -> Iterator[None]:
        """Write the summary and notify the trackers however the run ends."""
        try:
            yield
        except (Stopped, KeyboardInterrupt) as reason:
            status = "requeued" if stop.requeue else "stopped"
            cause = str(reason) or "interrupted"
            self.finish(status, cause, TRACKER_STATUS[status])
            command = "The same command" + (" without overwrite=true" if self.config["overwrite"] else "")
            print(f"Stopped ({cause}). {command} continues this run.", file=sys.stderr, flush=True)
            try:
                stop.leave()
            except Exception as error:
                self.write_summary("failed", f"{type(error).__name__}: {error}")
                if self.config["tracking"]:
                    self.folder.mark_unsent()
                    send_idle_run(self.config, self.folder.path)  # through new trackers, since those of the run have finished
                raise
            raise SystemExit(130) from None
        except BaseException as error:
            if self.folder.was_removed():
                self.tracker.finish("FAILED")
                raise UserError(
                    f"The run folder {self.folder.path} was removed; the same command starts the run again."
                ) from error
            status = "collapsed" if self.monitor.collapse and isinstance(error, UserError) else "failed"
            reported = explain_machine_error(error) or error
            try:
                self.finish(status, f"{type(reported).__name__}: {reported}", "FAILED")
            except Exception as second:  # the first error is the one to raise
                log.warning("the summary of the run could not be written (%s)", second)
            raise
        self.finish("collapsed" if self.monitor.collapse else "finished", self.monitor.collapse, "FINISHED")

    def resume(self) -> None:
        """Continue from the latest checkpoint, if there is one, and drop the metrics recorded after it."""
        self.checkpointer.clean()
        saved = self.load_checkpoint()
        if saved:
            log.info("resuming at step %d of %d", self.trainer.completed_steps, self.trainer.num_steps)
            if extension := describe_extension(self.trainer, saved):
                log.info("%s", extension)
                self.tags["extended"] = extension  # MLflow keeps the parameters of the shorter run
        self.records = self.folder.rewind(self.trainer.completed_steps if saved else -1)
        for file in histogram_files(self.folder.path):
            if not saved or int(file.stem) > self.trainer.completed_steps:
                file.unlink()

    def load_checkpoint(self) -> Config | None:
        """Load the latest checkpoint and return the identity that it holds, if any; every process must call this."""
        return self.checkpointer.load(self.trainer, self.monitor, self.components.hardware.device)

    def start_tracking(self) -> None:
        """Start or resume the tracked run and send the records that it lacks."""
        counts = self.components.model.parameter_counts()
        if self.config["tracking"]:
            self.folder.mark_unsent()
        self.run_id = self.tracker.start(
            self.folder.path,
            self.config["experiment_name"],
            {**flatten(hide_passwords(self.config)), **flatten(counts, "parameters")},
            provenance_tags() | self.tags,
            self.records,
        )
        self.tracker.log_artifact(self.folder.path / "config.yaml")

    def log_description(self) -> None:
        """Log what is about to run, and plot examples of what it predicts."""
        c, plan = self.components, self.trainer.plan
        counts = ", ".join(f"{name} {count:,}" for name, count in c.model.parameter_counts().items())
        log.info("run folder %s", self.folder.path)
        log.info("%s; parameters: %s", c.hardware.describe(), counts)
        steps_per_epoch = plan.steps_in_epoch(plan.batch_warmup)
        log.info("%d steps of %d images, %d steps per epoch", plan.num_steps, plan.batch_size, steps_per_epoch)
        for plot in plot_preview(c, self.preview, self.folder.path / "plots"):
            self.tracker.log_artifact(plot, "plots")

    def record(self, record: Record) -> None:
        """Write a record to the run folder and send it to the trackers."""
        self.records.append(record)
        self.folder.append(record)
        self.tracker.log(record)

    def record_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        """Write the histograms of a step to the run folder and send them to the trackers."""
        self.tracker.log_histograms(write_histograms(self.folder.path, step, histograms))

    def finish(self, status: str, reason: str | None, tracked_status: str) -> None:
        """Write the summary and the curves, finish the tracked run, and print the result of a finished run."""
        curves = self.folder.path / "plots" / "curves.png"
        try:
            plot_curves(self.records, curves)
        finally:  # the summary is written last, because it marks the run as complete
            summary = self.write_summary(status, reason)
        self.tracker.log_artifact(curves, "plots")
        self.tracker.log_artifact(self.folder.path / "summary.json")
        if self.tracker.finish(tracked_status):
            self.folder.mark_sent()
        if tracked_status == "FINISHED":
            print_summary(summary, self.folder.path, self.tracker.view_command())

    def write_summary(self, status: str, reason: str | None) -> Record:
        """Write the summary and return it."""
        summary = build_summary(self.config, self.trainer, self.monitor, self.records, self.run_id)
        summary |= {"status": status, "reason": reason}
        self.folder.write_summary(summary)
        return summary
