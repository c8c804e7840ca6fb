"""Sweeps of many runs: planning, launching on this machine or on SLURM, and comparison in tables and plots."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
