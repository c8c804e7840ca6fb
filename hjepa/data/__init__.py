"""Images: where they come from, how they are held or streamed, and how they are augmented."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
