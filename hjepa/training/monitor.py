"""Measurements during a run besides the training loss: held-out loss, collapse detection, and probes.

The network with random weights is measured as well, as the baseline of everything that follows. A run that starts from given
weights has a second baseline, these weights.
"""

import logging
import time
from typing import Any

import torch
from torch import Tensor

from hjepa.data.datamodule import Crops, Split, evenly_spaced_indices
from hjepa.distributed.seeding import generator
from hjepa.metrics.collapse import collapse_statistics, describe_collapse
from hjepa.metrics.probes import Probe, extract_features
from hjepa.models.encoder import Encoder
from hjepa.training.build import Components

log = logging.getLogger(__name__)

NUM_HELD_OUT = 256  # validation images for the held-out loss and the collapse detection

BATCH_SIZE = 64  # images per forward pass

# The attributes in a checkpoint, by their keys.
STATE = {
    "initial": "initial_scores",
    "untrained": "untrained_scores",
    "untrained_spread": "untrained_statistics",
    "latest": "latest_scores",
    "collapsed": "collapse",
    "seconds": "seconds",
}

Scores = dict[str, float]


class Monitor:
    """Measures the model of a run on the validation images.

    Args:
        components: Components of the run.
        probe: Probe of the features, or None.
        train: Training images, which the probe fits on.
        validation: Validation images.
        untrained: Encoder with random weights, for a run that starts from given weights. None: the teacher is one.

    Attributes:
        untrained_statistics: Collapse statistics of the encoder with random weights.
        untrained_scores: Probe scores of the encoder with random weights; empty without a probe.
        initial_scores: Probe scores of the weights that the run started from; empty if these were random, and without a probe.
        latest_scores: Latest probe scores.
        collapse: Description of the collapse found at the end of the last epoch, or None.
        seconds: Time spent on measurements.
    """

    def __init__(
        self, components: Components, probe: Probe | None, train: Split, validation: Split, untrained: Encoder | None
    ) -> None:
        self.components, self.model, self.probe, self.untrained = components, components.model, probe, untrained
        self.probe_splits = probe.select_images(train, validation) if probe and components.strategy.measures() else None
        self.held_out = validation.images[evenly_spaced_indices(len(validation), NUM_HELD_OUT)]
        self.untrained_statistics: Scores = {}
        self.untrained_scores: Scores = {}
        self.initial_scores: Scores = {}
        self.latest_scores: Scores = {}
        self.collapse: str | None = None
        self.seconds = 0.0

    def measure_start(self) -> Scores:
        """Measure the weights that the run starts from and the network with random weights, the baselines of what follows."""
        start, given = time.perf_counter(), self.untrained is not None
        name = "weights that the run starts from" if given else "untrained network"
        log.info("measuring the %s", name)
        by_encoder = self.collapse_statistics()
        statistics = by_encoder["student" if self.model.teacher_is_given else "teacher"]
        self.untrained_statistics = self.statistics_of(self.untrained) if self.untrained else statistics
        collapse = describe_collapse(statistics, self.untrained_statistics)
        if self.components.world.main and collapse and given:
            log.warning("The weights that the run starts from have collapsed (%s); start from others.", collapse)
        elif self.components.world.main and collapse:
            log.warning(
                "The features of the untrained network do not differ between images; look at the images, and at dataset.mean and "
                "dataset.std, which must suit them."
            )
        self.latest_scores = self.untrained_scores = self.probe_scores(self.model.encoder, f"probing the {name}")
        measured = {
            **self.held_out_loss(),
            **with_prefix("probe", self.latest_scores),
        }
        for encoder, values in by_encoder.items():
            measured |= with_prefix(encoder, values)
        if self.untrained:
            self.initial_scores = self.latest_scores
            self.untrained_scores = self.probe_scores(self.untrained, "probing a network with random weights")
            measured |= with_prefix("untrained", self.untrained_scores) | with_prefix("initial", self.initial_scores)
            self.untrained = None  # needed no more
        self.seconds += time.perf_counter() - start
        return measured

    def measure_epoch(self, run_probe: bool) -> Scores:
        """Measure the model at the end of an epoch, with or without the probe, and log a warning if it has collapsed."""
        start = time.perf_counter()
        statistics = self.collapse_statistics()
        measured = self.held_out_loss()
        collapses = []
        for encoder, values in statistics.items():
            measured |= with_prefix(encoder, values)
            if description := describe_collapse(values, self.untrained_statistics):
                collapses.append(f"{encoder}: {description}")
        self.collapse = "; ".join(collapses) or None
        measured["collapsed"] = float(bool(collapses))
        if collapses:
            log.warning("COLLAPSED - %s. These features are useless; see train.stop_on_collapse.", self.collapse)
        if run_probe and self.probe:
            self.latest_scores = self.probe_scores(self.model.encoder, "probing")
            measured |= with_prefix("probe", self.latest_scores) | with_prefix("untrained", self.untrained_scores)
            measured |= with_prefix("initial", self.initial_scores)
        self.seconds += time.perf_counter() - start
        return measured

    def probe_scores(self, encoder: Encoder, description: str) -> Scores:
        """Return the probe scores of an encoder; `description` labels the progress bar."""
        if not self.probe or not self.probe_splits:
            return {}
        progress = description if self.components.world.main else None
        return self.probe(encoder, *self.probe_splits, self.components.dataset.normalize, progress)

    def collapse_statistics(self) -> dict[str, Scores]:
        """Return the collapse statistics of student and teacher, as far as the run trains them."""
        encoders = {} if self.model.teacher_is_given else {"teacher": self.model.teacher}
        encoders |= {} if self.model.teacher_is_student else {"student": self.model.student}
        return {name: self.statistics_of(encoder) for name, encoder in encoders.items()}

    def statistics_of(self, encoder: Encoder) -> Scores:
        """Return the collapse statistics of the last layer of an encoder on the held-out images."""
        batches, normalize = self.held_out.split(BATCH_SIZE), self.components.dataset.normalize
        features = torch.cat(list(extract_features(encoder, batches, normalize)))
        return collapse_statistics(features[:, -encoder.feature_dims[-1] :])

    @torch.no_grad()
    def held_out_loss(self) -> Scores:
        """Return the loss on held-out images with fixed masks, and the loss of predicting one constant vector.

        Levels with targets in other views are measured on fixed augmented crops. The result is empty for a model without levels.
        """
        if not self.model.levels:
            return {}
        c = self.components
        training = self.model.training
        self.model.eval()
        size = min(BATCH_SIZE, len(self.held_out))
        batches = self.held_out[: len(self.held_out) // size * size].split(size)  # contrastive losses depend on their size
        sums = torch.zeros(2)
        for i, images in enumerate(batches):
            crops, views = self.held_out_crops(images.to(c.hardware.device), i)
            masks = c.sampler(len(images) * views, generator(0, "held out", i)).to(c.hardware.device)
            with c.hardware.autocast():
                output = self.model(crops.global_crops, masks, crops.local_crops, crops.boxes, views)
            loss, _ = c.objective.prediction_loss(output)
            sums += torch.stack([loss, c.objective.constant_baseline(output)]).cpu() / len(batches)
        self.model.train(training)
        return {"validation/loss": sums[0].item(), "validation/constant_loss": sums[1].item()}

    def held_out_crops(self, images: Tensor, batch: int) -> tuple[Crops, int]:
        """Return the crops of a batch of held-out images, and the number of global crops of each.

        They are the images themselves unless a level has targets in other views.
        """
        dataset = self.components.dataset
        if self.model.needs_views:
            crops = dataset.make_crops(images, dataset.sample_params(len(images), generator(0, "held-out crops", batch)))
            return crops, dataset.views
        whole = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=images.device)
        return Crops(dataset.normalize(images), None, whole.expand(len(images), 1, -1, -1)), 1

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements so far."""
        return {key: getattr(self, attribute) for key, attribute in STATE.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state_dict`."""
        if "initial" not in state:  # of an earlier version, which called the weights that a run started from untrained
            given = self.untrained is not None
            state |= {"initial": state["untrained"], "untrained": {}} if given else {"initial": {}}
        self.untrained = None  # was measured
        for key, attribute in STATE.items():
            setattr(self, attribute, state[key])


def with_prefix(prefix: str, values: Scores) -> Scores:
    """Return the values under the names `prefix/name`."""
    return {f"{prefix}/{name}": value for name, value in values.items()}
