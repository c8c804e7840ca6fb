"""What a training step costs: `task=benchmark`."""
