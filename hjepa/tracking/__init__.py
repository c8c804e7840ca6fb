"""What a run leaves behind: its folder, and the trackers (MLflow, TensorBoard, Weights & Biases) that copy it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
