"""Classes and YAML files in folders of the user extend every part without a change in this repository."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers.runs import launch

MASKING = '''
from collections.abc import Sequence

import torch
from torch import Generator

from hjepa.masking import CellMaskSampler, Masks


class Checkerboard(CellMaskSampler):
    """Predict every other cell.

    Args:
        grid: Side of the patch grid.
        pools: Pools of the levels.
        offset: Which half is predicted, 0 or 1.
    """

    def __init__(self, grid: int, pools: Sequence[int], offset: int) -> None:
        super().__init__(grid, pools)
        self.offset = offset

    def __call__(self, batch_size: int, generator: Generator) -> Masks:
        side = self.grid // self.coarsest_pool
        cell = torch.arange(self.num_cells)
        half = (cell // side + cell + self.offset) % 2
        context, targets = (cell[half == part].expand(batch_size, 1, -1) for part in (1, 0))
        return self.build_masks(context, targets)
'''

LOSS = '''
import torch.nn.functional as F
from torch import Tensor

from hjepa.config.types import PositiveFloat
from hjepa.losses import PredictionLoss


class Huber(PredictionLoss):
    """Huber loss, quadratic up to a difference of delta."""

    def __init__(self, delta: PositiveFloat) -> None:
        self.delta = delta

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(prediction, target, delta=self.delta)
'''

DATA = '''
from typing import Literal

import torch

from hjepa import data
from hjepa.config.types import PositiveInt
from hjepa.distributed.seeding import generator


class Noise(data.DataModule):
    """Random images with random labels."""

    def __init__(self, num_images: PositiveInt, **common: object) -> None:
        super().__init__(**common)
        self.num_images = num_images

    def load(self, split: Literal["train", "test"]) -> data.Split:
        shape, rng = (self.num_images, 3, self.image_size, self.image_size), generator(0, split)
        images = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
        return data.Split(images, {"class": torch.randint(10, (self.num_images,), generator=rng)})
'''

ENCODER = '''
from collections.abc import Sequence

from torch import Tensor, nn

from hjepa.config.types import PositiveInt
from hjepa.models import Encoder, Stage
from hjepa.models.layers import gather_tokens, patchify


class PatchMLP(Encoder):
    """An MLP with residual blocks that encodes every patch by itself."""

    def __init__(
        self, image_size: int, patch_size: PositiveInt, num_summary_tokens: int, dim: PositiveInt, depth: PositiveInt
    ) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.num_summary_tokens = image_size, patch_size, 0
        self.layer_dims = (dim,) * depth
        self.embed = nn.Linear(3 * patch_size**2, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(depth)
        )

    def forward(self, images: Tensor, keep: Tensor | None = None, layers: Sequence[int] | None = None) -> list[Stage]:
        tokens = self.embed(patchify(images, self.patch_size))
        if keep is not None:
            tokens = gather_tokens(tokens, keep).flatten(0, 1)
        stages = []
        for number, block in enumerate(self.blocks, 1):
            tokens = tokens + block(tokens)
            if number in (layers or [self.num_layers]):
                stages.append(Stage(tokens, images.shape[-1] // self.patch_size, 0))
        return stages

    def layer_ids(self) -> dict[str, int]:
        return {name: 1 + int(name.split(".")[1]) if "blocks" in name else 0 for name, _ in self.named_parameters()}
'''

FILES = {
    "lab/__init__.py": "",
    "lab/masks.py": MASKING,
    "lab/losses.py": LOSS,
    "lab/noise.py": DATA,
    "lab/encoder.py": ENCODER,
    "lab/broken.py": "import a_package_that_is_not_installed\n\n\nclass Loss:\n    pass\n",
    "conf/masking/checkerboard.yaml": "_target_: lab.masks.Checkerboard\noffset: 0\n",
    "conf/loss/huber.yaml": "_target_: lab.losses.Huber\ndelta: 1.0\n",
    "conf/loss/missing.yaml": "_target_: labs.losses.Huber\n",
    "conf/loss/unnamed.yaml": "_target_: lab.losses.Hubert\n",
    "conf/loss/broken.yaml": "_target_: lab.broken.Loss\n",
    "conf/dataset/noise.yaml": "defaults: [_common, _self_]\n_target_: lab.noise.Noise\nnum_images: 100\n",
    "conf/model/patch_mlp.yaml": """
_target_: hjepa.models.HJEPA
image_size: ${dataset.image_size}
patch_size: 4
encoder:
  _target_: lab.encoder.PatchMLP
  _partial_: true
  dim: 32
  depth: 2
predictor:
  _target_: hjepa.models.Predictor
  _partial_: true
  dim: 24
  depth: 1
  heads: 2
  attention: cross
  joint: true
pretrained: null
""",
}

OWN = ("masking=checkerboard", "loss=huber", "dataset=noise", "model=patch_mlp", "levels=pyramid")
SHORT = (
    *("train.epochs=null", "train.steps=2", "train.batch_size=8", "tracking=none", "probe=none", "hardware=cpu"),
    *("hardware.threads=1", "output_root=out"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a package and a config folder of its own."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    """Return the folder of a run of own classes, started in the project with a relative config folder."""
    done = launch("--config-dir", "conf", *OWN, *SHORT, "name=r", cwd=project)
    assert done.returncode == 0, done.stderr
    return project / "out" / "default" / "r"


def test_a_run_of_own_classes_records_its_choices(trained: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(trained / "config.yaml"))
    assert config["loss"] == {"_target_": "lab.losses.Huber", "delta": 1.0}
    assert config["choices"].items() >= {"masking": "checkerboard", "loss": "huber", "dataset": "noise"}.items()


def test_the_processes_of_a_sweep_find_own_classes_through_the_search_path(project: Path) -> None:
    """Every job of the sweep has two processes of its own, and is named after its choices."""
    sweep = (f"hydra.searchpath=[file://{project}/conf]", "seed=0,1", "hardware.processes=2", "experiment_name=sweep")
    done = launch("--multirun", *sweep, "masking=checkerboard", "loss=huber", "dataset=noise", *SHORT, cwd=project)
    assert done.returncode == 0, done.stderr
    names = sorted(folder.name for folder in (project / "out" / "sweep").iterdir())
    assert [name.rpartition("-")[0] for name in names] == [
        f"noise-vit_nano-pyramid_summary-checkerboard-huber-s{i}" for i in (0, 1)
    ]


def test_the_config_of_a_run_folder_calls_own_classes_only_with_their_config_folder(trained: Path, project: Path) -> None:
    task = ("task=visualize", f"run={trained}", "task.pictures=[predictions]", *SHORT)
    refused = launch(*task, cwd=project)
    assert refused.returncode == 1
    assert "_target_='lab." in refused.stderr
    assert "is not allowed, because no YAML file in conf/ names it" in refused.stderr
    allowed = launch("--config-dir", "conf", *task, cwd=project)
    assert allowed.returncode == 0, allowed.stderr


def test_the_config_of_a_stranger_is_refused_even_beside_a_config_folder(trained: Path, project: Path) -> None:
    folder = trained.parent / "stranger"
    shutil.copytree(trained, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.loss = {"_target_": "os.system", "command": f"touch {folder}/owned"}
    OmegaConf.save(config, folder / "config.yaml")
    task = ("task=visualize", f"run={folder}", "task.pictures=[predictions]", *SHORT)
    for config_folder in ("conf", "."):
        refused = launch("--config-dir", config_folder, *task, cwd=project)
        assert refused.returncode == 1
        assert "_target_='" in refused.stderr
        assert "is not allowed" in refused.stderr
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-dir", "nowhere"], ["nowhere", "not found"]),
        (["--config-dir", "conf", "loss=hubert"], ["loss=hubert is not an option; did you mean huber?"]),
        (["--config-dir", "conf", "loss=huber", "loss.delta=0"], ["loss.delta=0: expected PositiveFloat"]),
        (["--config-dir", "conf", "loss=huber", "+loss.beta=0"], ["loss.beta is not an option of lab.losses.Huber", "delta"]),
        (["--config-dir", "conf", "dataset=noise", "+dataset.size=9"], ["dataset.size is not an option of lab.noise.Noise"]),
        (["--config-dir", "conf", "loss=missing"], ["_target_=labs.losses.Huber: there is no module labs.losses", "PYTHONPATH"]),
        (["--config-dir", "conf", "loss=unnamed"], ["the module lab.losses has no class or function Hubert"]),
        (["--config-dir", "conf", "loss=broken"], ["importing lab.broken failed at", "a_package_that_is_not_installed"]),
    ],
)
def test_mistakes_get_one_sentence(project: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = launch(*arguments, *SHORT, f"output_root={tmp_path}", cwd=project)
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
