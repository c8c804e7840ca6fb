"""Hydra launchers for sweeps. Hydra imports them at every start, so they import hjepa only when a sweep is launched."""
