"""Measurements of speed that are run by hand; see docs/speed.md."""
