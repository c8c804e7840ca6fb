"""A run that is looked at afterwards: its model at a checkpoint, the same model before training, and its data.

Every task that reads a run (`run=outputs/default/NAME`) opens it here. What the run is comes from its folder; where and how to
compute comes from the command line (`hardware`, `tracking`, `task`).
"""

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build
from hjepa.config.schema import Config, check
from hjepa.data.datamodule import DataModule
from hjepa.distributed.device import Hardware
from hjepa.distributed.process_group import World
from hjepa.losses import Objective
from hjepa.masking import MaskSampler
from hjepa.models.hjepa import HJEPA
from hjepa.models.levels import pool_cells
from hjepa.models.pretrained import check_fits, find_checkpoint, read
from hjepa.models.stacked import StackedLevel
from hjepa.models.vit import ViTEncoder
from hjepa.tracking.run_folder import read_config
from hjepa.training.build import build_model


@dataclass(frozen=True)
class TrainedRun:
    """A run at one of its checkpoints, everything on the device and in evaluation mode.

    Attributes:
        folder: of the run; config: its own, as it was trained, but for `hardware` and `tracking`, which are the command's.
        checkpoint: the file; step: optimizer steps that it had taken.
        untrained: the teacher as it was initialized at random; untrained_upper: the stacked levels likewise, None for none.
    """

    folder: Path
    config: Config
    checkpoint: Path
    step: int
    hardware: Hardware
    dataset: DataModule
    model: HJEPA
    sampler: MaskSampler
    objective: Objective
    untrained: ViTEncoder
    untrained_upper: StackedLevel | None

    @property
    def encoder(self) -> ViTEncoder:
        """The teacher: whose features are probed, looked at and exported."""
        return self.model.teacher

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of the checkpoint file."""
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def load_run(config: Config, checkpoint: str | None, root: str | None) -> TrainedRun:
    """Open the run that `run` names.

    Args:
        checkpoint: name of a checkpoint of the run, such as latest, best or epoch-00005; None takes the best by probe or,
            without one, the latest.
        root: folder of the images, if they are not where they were in training.

    Raises:
        UserError: there is no run, no such checkpoint, or it is of another version of this framework.
    """
    folder = run_folder(config)
    run = load_run_config(folder, config, root)
    path = find_checkpoint(folder) if checkpoint is None else folder / "checkpoints" / f"{checkpoint.removesuffix('.pt')}.pt"
    if not path.exists():
        there = sorted(file.stem for file in (folder / "checkpoints").glob("*.pt"))
        raise UserError(
            f"There is no checkpoint {path}; "
            + (f"choose task.checkpoint among {', '.join(there)}." if there else "the run was stopped before its first one.")
        )
    hardware: Hardware = build(run["hardware"])
    hardware.prepare(World())
    dataset: DataModule = build(run["dataset"])
    model, sampler, objective = build_model(run)
    untrained, upper = copy.deepcopy((model.teacher, model.upper))
    if run["teacher"]["_target_"] == "hjepa.training.SharedWeights":
        model.share_teacher()
    state = read(path, hardware.device)
    check_fits(model.state_dict(), state["model"], str(path))
    model.load_state_dict(state["model"])
    for module in (model, untrained, *([upper] if upper else [])):
        module.to(hardware.device).eval()
    return TrainedRun(folder, run, path, int(state["step"]), hardware, dataset, model, sampler, objective, untrained, upper)


def run_folder(config: Config) -> Path:
    """The run folder that `run` names."""
    if not config["run"]:
        raise UserError("This task needs a run folder: run=outputs/default/NAME.")
    folder = Path(config["run"]).expanduser().absolute()
    if not (folder / "config.yaml").exists():
        raise UserError(f"run={folder} is no run folder: it has no config.yaml; give one of those that runs name at their ends.")
    return folder


def load_run_config(folder: Path, config: Config, root: str | None) -> Config:
    """The config of a run, to be computed where the command says and with random weights to begin with."""
    run = read_config(folder)
    run |= {"hardware": config["hardware"] | {"processes": 1, "shard": False, "compile": False}, "tracking": config["tracking"]}
    run["init_from"] = None
    try:
        check(run)
    except (UserError, KeyError) as error:
        raise UserError(f"{folder}/config.yaml is of another version of hjepa, or was changed: {error}") from None
    run["model"]["pretrained"] = None
    if root:
        if "root" not in run["dataset"]:
            raise UserError(f"task.root={root}: the dataset of {folder.name} has no root; leave it out.")
        run["dataset"]["root"] = root
    return run


NetworkKind = Literal["trained", "untrained"]

NETWORK_KINDS: tuple[NetworkKind, NetworkKind] = ("trained", "untrained")


@dataclass(frozen=True)
class LayerTokens:
    """What a layer says of B images: `cells` [B, side^2, D] in raster order, and `pooled` [B, F] as the probes see them."""

    cells: Tensor
    pooled: Tensor


class LayerFeatures:
    """An encoder and the teachers stacked on it, trained or not.

    Args:
        depths: ascending numbers of blocks after which the encoder is looked at, the last one its depth.
    """

    def __init__(self, encoder: ViTEncoder, upper: StackedLevel | None, depths: list[int]) -> None:
        self.encoder, self.depths = encoder, depths
        self.stacked_levels = upper.stacked_levels() if upper else []

    def names(self) -> list[str]:
        """The layers, the encoder's last block first, then its other depths, then the stacked levels."""
        return [*(f"block {d}" for d in reversed(self.depths)), *(f"stacked {i + 1}" for i in range(len(self.stacked_levels)))]

    def tokens_on_cpu(self, images: Tensor) -> dict[str, LayerTokens]:
        """All layers' tokens of float images [B, 3, S, S], by name, on the CPU."""
        return {name: LayerTokens(t.cells.float().cpu(), t.pooled.float().cpu()) for name, t in self.tokens(images).items()}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> dict[str, LayerTokens]:
        """The same where the images are."""
        states = dict(zip(self.depths, self.encoder(images, depths=self.depths), strict=True))
        s = self.encoder.summary_tokens
        layers = {d: LayerTokens(states[d][:, s:], self.encoder.pooled(states[d])) for d in reversed(self.depths)}
        found = list(layers.values())
        below = layers[self.encoder.depth].cells
        for stage in self.stacked_levels:
            below = stage.teacher(pool_cells(below, stage.grid, stage.pool))
            found.append(LayerTokens(below, below.mean(1)))
        return dict(zip(self.names(), found, strict=True))

    def blocks(self, name: str) -> tuple[list[Any], int]:
        """The transformer blocks that lead to a layer, and how many summary tokens pass through them with its cells."""
        kind, number = name.split()
        if kind == "block":
            return list(self.encoder.blocks)[: int(number)], self.encoder.summary_tokens
        return list(self.stacked_levels[int(number) - 1].teacher.blocks), 0


def layer_features(run: TrainedRun, depths: list[int]) -> dict[NetworkKind, LayerFeatures]:
    """The trained and the untrained network of a run, to be looked at at these depths."""
    pairs = ((run.encoder, run.model.upper), (run.untrained, run.untrained_upper))
    return {who: LayerFeatures(*pair, depths) for who, pair in zip(NETWORK_KINDS, pairs, strict=True)}
