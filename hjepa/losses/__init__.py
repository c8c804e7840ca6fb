"""Objectives: a prediction loss over the levels plus an optional regularizer of the student's features.

An objective is called on the model's `Output` and returns `(scalar, {name: 0-d tensor})`. The scalar is minimized; the named
terms are unweighted, detached, and stay on the device until they are logged. Prediction losses compare the predictions of a level
with the teacher's targets. Regularizers keep the student's pooled features from collapsing, and make the views of an image agree;
with `levels=none` the regularizer is the whole objective.

To add a loss, write a subclass of `PredictionLoss` with `distance` and a file in conf/loss/ that names it. To add a
regularizer, write a subclass of `Regularizer` with `terms` and a file in conf/regularizer/.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
