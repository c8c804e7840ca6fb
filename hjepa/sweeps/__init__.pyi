from .sweep import SweepStart as SweepStart
