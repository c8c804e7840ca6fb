from .dense import DenseProbe as DenseProbe
from .few_shot import FewShot as FewShot
from .finetune import FineTuning as FineTuning
from .linear_knn import KNNProbe as KNNProbe
from .linear_knn import LinearProbe as LinearProbe
from .quality import Quality as Quality
from .transfer import Transfer as Transfer
