"""Mask samplers choose the patches that the student sees and the cells that it has to predict."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
