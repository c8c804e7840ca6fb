"""The tasks: one entry point for every file in `conf/task/`.

To add a task, write a function `(config, path, **options)`, list it in `__init__.pyi`, and write a file in `conf/task/` with the
options that names the function as `_target_` with `_partial_: true`. `config` is the whole resolved config, `path` the folder of
the run that the config describes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
