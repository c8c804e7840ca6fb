"""`task=benchmark`: what a training step costs."""
