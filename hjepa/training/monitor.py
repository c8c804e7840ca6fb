"""What a run measures of itself besides the loss it minimizes: held-out loss, collapse watch, probes, the untrained network."""

import logging
import time
from typing import Any

import torch

from hjepa.data.datamodule import DataModule, Split, spaced
from hjepa.distributed.device import Hardware
from hjepa.distributed.seeding import generator
from hjepa.losses import PredictionLoss
from hjepa.masking import MaskSampler
from hjepa.metrics.collapse import feature_spread, verdict
from hjepa.metrics.probes import Probe, extract
from hjepa.models.hjepa import HJEPA

log = logging.getLogger(__name__)

HELD_OUT = 256  # validation images for the held-out loss and the collapse watch

PART = 64  # images per forward pass

STATE = ("untrained", "untrained_spread", "latest", "collapsed", "seconds")

Scores = dict[str, float]


class Monitor:
    """Measures a model on the validation part.

    Args:
        probe: None measures no probes; train, validation: the two parts of the training split.
    """

    def __init__(
        self,
        model: HJEPA,
        hardware: Hardware,
        dataset: DataModule,
        sampler: MaskSampler,
        loss: PredictionLoss,
        probe: Probe | None,
        train: Split,
        validation: Split,
    ) -> None:
        self.model, self.hardware, self.dataset, self.sampler, self.loss = model, hardware, dataset, sampler, loss
        self.probe = probe
        self.parts = probe.choose(train, validation) if probe else None
        self.held_out = validation.images[spaced(len(validation), HELD_OUT)]
        self.untrained_spread: Scores = {}
        self.untrained: Scores = {}
        self.latest: Scores = {}
        self.collapsed: str | None = None
        self.seconds = 0.0

    def begin(self) -> Scores:
        """Measure the untrained network: the baseline of everything later."""
        began = time.perf_counter()
        self.untrained_spread = self.spreads()["teacher"]
        self.untrained = self.latest = self.scores()
        measured = {**self.held_out_loss(), **named("teacher", self.untrained_spread), **named("probe", self.untrained)}
        self.seconds += time.perf_counter() - began
        return measured

    def epoch(self, probe_now: bool) -> Scores:
        """Measure at the end of an epoch; a collapse is put in words and warned about."""
        began = time.perf_counter()
        spreads = self.spreads()
        measured = self.held_out_loss()
        for who, figures in spreads.items():
            measured |= named(who, figures)
        found = [f"{who}: {word}" for who, figures in spreads.items() if (word := verdict(figures, self.untrained_spread))]
        self.collapsed = "; ".join(found) or None
        measured["collapsed"] = float(bool(found))
        if found:
            log.warning("COLLAPSED - %s. Its features are of no use; see train.stop_on_collapse.", self.collapsed)
        if probe_now and self.probe:
            self.latest = self.scores()
            measured |= named("probe", self.latest) | named("untrained", self.untrained)
        self.seconds += time.perf_counter() - began
        return measured

    def scores(self) -> Scores:
        """Probe scores of the teacher."""
        return self.probe(self.model.teacher, *self.parts, self.dataset.normalize) if self.probe and self.parts else {}

    def spreads(self) -> dict[str, Scores]:
        """How the held-out images' features differ, for teacher and student."""
        encoders = {"teacher": self.model.teacher} | ({} if self.model.teacher_is_student else {"student": self.model.student})
        return {who: feature_spread(extract(e, self.held_out, self.dataset.normalize, PART)) for who, e in encoders.items()}

    @torch.no_grad()
    def held_out_loss(self) -> Scores:
        """Loss on held-out images under fixed masks, beside that of predicting one constant vector; empty without levels."""
        if not self.model.predictor:
            return {}
        training = self.model.training
        self.model.eval()
        sums, parts = torch.zeros(2), self.held_out.split(PART)
        for i, images in enumerate(parts):
            masks = self.sampler(len(images), generator(0, "held out", i)).to(self.hardware.device)
            with self.hardware.autocast():
                output = self.model(self.dataset.normalize(images.to(self.hardware.device)), masks)
                total, _ = self.loss(output)
            sums += torch.stack([total, self.loss.constant(output)]).cpu() * len(images) / len(self.held_out)
        self.model.train(training)
        return {"validation/loss": sums[0].item(), "validation/constant_loss": sums[1].item()}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {key: getattr(self, key) for key in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for key in STATE:
            setattr(self, key, state[key])


def named(prefix: str, figures: Scores) -> Scores:
    """Figures under `prefix/name`."""
    return {f"{prefix}/{name}": value for name, value in figures.items()}
