from .encoder import Encoder as Encoder
from .encoder import Stage as Stage
from .hjepa import HJEPA as HJEPA
from .layers import Projector as Projector
from .levels import Levels as Levels
from .predictor import Predictor as Predictor
from .stacked import StackedLevel as StackedLevel
from .vit import ViTEncoder as ViTEncoder
