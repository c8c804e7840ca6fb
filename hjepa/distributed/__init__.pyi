from .device import Hardware as Hardware
