"""hjepa: hierarchical joint-embedding predictive architectures (H-JEPA) on images."""
