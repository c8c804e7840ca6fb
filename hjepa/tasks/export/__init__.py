"""`task=export` and `task=features`: the encoder and its features in formats that need no hjepa."""
