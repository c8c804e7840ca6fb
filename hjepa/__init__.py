"""Hierarchical joint-embedding predictive architectures (H-JEPA) on images.

The Python API is `hjepa.compose`, `hjepa.train` and `hjepa.load`; see `hjepa.api`. Importing the package takes no time: names are
imported when they are first used.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
