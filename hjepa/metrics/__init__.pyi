from .probes import Probe as Probe
