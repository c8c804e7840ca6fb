from .mlflow import MLflow as MLflow
from .run_name import SweptOptions as SweptOptions
from .tensorboard import TensorBoard as TensorBoard
from .tracker import Tracker as Tracker
from .wandb import Wandb as Wandb
