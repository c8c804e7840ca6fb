"""The networks: encoders, predictor, levels, and the H-JEPA that combines them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
