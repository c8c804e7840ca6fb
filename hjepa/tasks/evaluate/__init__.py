"""`task=evaluate`: score the features of finished runs by several protocols.

To add a protocol, write a class like `LinearProbe` (see `hjepa.tasks.evaluate.protocol.EvalProtocol`), list it in `__init__.pyi`,
and write a file in `conf/protocol/` that names it; list it in `conf/protocol/all.yaml` to make it part of `protocol=all`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
