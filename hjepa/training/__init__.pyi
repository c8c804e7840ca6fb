from .checkpoint import Checkpointer as Checkpointer
from .teacher import EMA as EMA
from .teacher import Frozen as Frozen
from .teacher import PeriodicCopy as PeriodicCopy
from .teacher import SharedWeights as SharedWeights
from .teacher import TeacherUpdate as TeacherUpdate
from .trainer import Trainer as Trainer
