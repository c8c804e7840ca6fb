from .api import Run as Run
from .api import compose as compose
from .api import load as load
from .api import train as train
from .config.errors import UserError as UserError

__version__: str
