from .augment import Augment as Augment
from .datamodule import DataModule as DataModule
from .datamodule import Split as Split
from .image_folder import FolderMixture as FolderMixture
from .image_folder import ImageFolder as ImageFolder
from .image_folder import ImageNet as ImageNet
from .shapes import Shapes as Shapes
from .torchvision_datasets import TorchvisionDataset as TorchvisionDataset
