"""`task=benchmark`: the cost of a training step."""
