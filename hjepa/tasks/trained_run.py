"""A finished run, reopened: its model at a checkpoint, its baselines before training, and its data.

Every task that reads a run (`run=outputs/default/NAME`) loads it with `load_run`. The run's folder determines the model and the
data; the command line determines where and how to compute (`hardware`, `tracking`, `task`).
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.identity import starts_from_weights
from hjepa.config.instantiate import build
from hjepa.config.schema import Config, check
from hjepa.data.datamodule import DataModule
from hjepa.distributed.device import Hardware
from hjepa.distributed.process_group import World
from hjepa.losses import Objective
from hjepa.masking import MaskSampler
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.hjepa import HJEPA
from hjepa.models.levels import pool_cells
from hjepa.models.pretrained import check_fits, read_checkpoint
from hjepa.models.stacked import StackedLevel
from hjepa.models.weight_files import find_checkpoint
from hjepa.tracking.run_folder import read_config
from hjepa.training.build import build_model
from hjepa.training.teacher import TeacherUpdate


@dataclass(frozen=True)
class TrainedRun:
    """A run at one of its checkpoints, with all modules on the device and in evaluation mode.

    Attributes:
        folder: Run folder.
        config: Config of the run as it was trained, except for `hardware` and `tracking`, which come from the command line.
        checkpoint: Checkpoint file.
        step: Number of optimizer steps that the checkpoint had taken.
        hardware: Device and precision to compute with.
        dataset: Dataset of the run.
        model: Model with the weights of the checkpoint.
        started_from_weights: Whether the run started from given weights instead of random ones.
        sampler: Mask sampler of the run.
        objective: Loss and regularizer of the run.
        untrained: Teacher encoder with its random initial weights.
        untrained_upper: First stacked level with its random initial weights, None without stacked levels.
    """

    folder: Path
    config: Config
    checkpoint: Path
    step: int
    hardware: Hardware
    dataset: DataModule
    model: HJEPA
    started_from_weights: bool
    sampler: MaskSampler
    objective: Objective
    untrained: Encoder
    untrained_upper: StackedLevel | None

    @property
    def encoder(self) -> Encoder:
        """The encoder that is probed, visualized and exported."""
        return self.model.encoder

    @cached_property
    def initial(self) -> HJEPA | None:
        """The model with the weights that the run started from; None if these were random, or are not known."""
        path = self.folder / "checkpoints" / "initial.pt"
        if not self.started_from_weights or not path.exists():
            return None
        model = copy.deepcopy(self.model)
        load_checkpoint(model, path, self.hardware)
        return model

    @cached_property
    def hash(self) -> str:
        """The first 12 hexadecimal digits of the checkpoint file's SHA-256 hash."""
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def load_run(config: Config, checkpoint: str | None, root: str | None) -> TrainedRun:
    """Load the run that `run` names.

    Args:
        config: Config of the command.
        checkpoint: Name of a checkpoint of the run, such as latest, best or epoch-00005. None selects the best one by probe or,
            without one, the latest.
        root: Folder of the images, if it is not the one used in training.

    Raises:
        UserError: If the run or the checkpoint does not exist, or was written by an incompatible version of this package.
    """
    folder = run_folder(config)
    run = load_run_config(folder, config, root)
    path = find_checkpoint(folder) if checkpoint is None else folder / "checkpoints" / f"{checkpoint.removesuffix('.pt')}.pt"
    if not path.exists():
        names = sorted(file.stem for file in (folder / "checkpoints").glob("*.pt"))
        remedy = f"this run has {', '.join(names)}" if names else "the run was stopped before its first one"
        raise UserError(f"There is no checkpoint {path}; {remedy}.")
    hardware: Hardware = build(run["hardware"])
    hardware.prepare(World())
    dataset: DataModule = build(run["dataset"])
    model, sampler, objective = build_model(run)
    untrained, untrained_upper = copy.deepcopy((model.teacher, model.upper))
    teacher: TeacherUpdate = build(run["teacher"])
    if teacher.shares_weights:
        model.share_teacher()
    model.set_teacher_kind(given=teacher.never_changes)
    step = load_checkpoint(model, path, hardware)
    for module in filter(None, (model, untrained, untrained_upper)):
        module.to(hardware.device).eval()
    return TrainedRun(
        folder=folder,
        config=run,
        checkpoint=path,
        step=step,
        hardware=hardware,
        dataset=dataset,
        model=model,
        started_from_weights=starts_from_weights(read_config(folder)),
        sampler=sampler,
        objective=objective,
        untrained=untrained,
        untrained_upper=untrained_upper,
    )


def load_checkpoint(model: HJEPA, path: Path, hardware: Hardware) -> int:
    """Load the weights of a checkpoint, and return the number of optimizer steps that it had taken."""
    state = read_checkpoint(path, hardware.device)
    check_fits(model.state_dict(), state["model"], str(path))
    model.load_state_dict(state["model"])
    return int(state["step"])


def run_folder(config: Config) -> Path:
    """Return the run folder that `run` names.

    Raises:
        UserError: If `run` is not set or is not a run folder.
    """
    if not config["run"]:
        raise UserError("This task needs a run folder: run=outputs/default/NAME.")
    folder = Path(config["run"]).expanduser().absolute()
    if not (folder / "config.yaml").exists():
        raise UserError(f"run={folder} is no run folder: it has no config.yaml; use a folder that a run printed when it ended.")
    return folder


def load_run_config(folder: Path, config: Config, root: str | None) -> Config:
    """Return the config of a run, with the hardware of the command and without pretrained weights to load."""
    run = read_config(folder)
    run |= {"hardware": config["hardware"] | {"processes": 1, "shard": False, "compile": False}, "tracking": config["tracking"]}
    run["init_from"] = None
    try:
        check(run)
    except (UserError, KeyError) as error:
        raise UserError(f"{folder}/config.yaml is of another version of hjepa, or was changed: {error}") from None
    run["model"] |= {"pretrained": None, "pretrained_key": None}
    if root:
        option = next((name for name in ("root", "path") if name in run["dataset"]), None)
        if option is None:
            reads = "reads several folders, which one cannot replace" if "roots" in run["dataset"] else "does not read a folder"
            raise UserError(f"task.root={root}: the dataset of {folder.name} {reads}; leave task.root out.")
        run["dataset"][option] = root
    return run


NetworkKind = Literal["trained", "initial", "untrained"]  # initial: the weights that the run started from, if they were given

NETWORK_KINDS: tuple[NetworkKind, NetworkKind] = ("trained", "untrained")  # those of every run


@dataclass(frozen=True)
class LayerTokens:
    """The output of one layer for B images, or the outputs of all layers that the features consist of.

    Attributes:
        stages: Tokens of the layer, or of the layers.
        pooled: Image features as the probes use them [B, F].
    """

    stages: list[Stage]
    pooled: Tensor

    @property
    def grid(self) -> int:
        """Side of the grid of `cells`, the coarsest one of the stages."""
        return min(stage.grid for stage in self.stages)

    @property
    def cells(self) -> Tensor:
        """Tokens in raster order [B, grid^2, D]; those of several stages are side by side, averaged to one grid."""
        return self.cells_on(self.grid)

    def cells_on(self, grid: int) -> Tensor:
        """Return the same as `cells`, averaged to a coarser grid [B, grid^2, D]."""
        return torch.cat([pool_cells(stage.cells, stage.grid, stage.grid // grid) for stage in self.stages], dim=2)

    def cpu(self) -> "LayerTokens":
        """Return the tokens of the cells and the features in float32 on the CPU."""
        return LayerTokens([Stage(self.cells.float().cpu(), self.grid, 0)], self.pooled.float().cpu())


class LayerFeatures(nn.Module):
    """The layers of an encoder and of the levels stacked on it, in evaluation mode.

    Layers have the names "block 3" (or "stage 3", see `Encoder.layer_name`) and "stacked 1". If the features of the encoder
    consist of all layers, these together are one more layer, "all blocks".

    Args:
        encoder: Encoder, trained or not.
        upper: First stacked level, None without stacked levels.
        depths: Ascending numbers of the encoder's layers to return; the last one is the encoder's last layer.
        given: Frozen teacher, whose output stacked levels with `detach` take as in training; None without one.
    """

    def __init__(self, encoder: Encoder, upper: StackedLevel | None, depths: list[int], given: Encoder | None = None) -> None:
        super().__init__()
        self.encoder, self.depths, self.given = encoder, depths, given
        self.layer_names = {f"{encoder.layer_name} {depth}": depth for depth in reversed(depths)}
        self.joint_names = [f"all {encoder.layer_name}s"] if encoder.pooled == "all" else []
        self.stacked_levels = upper.stacked_levels() if upper else []
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.encoder.device

    def names(self) -> list[str]:
        """Return the names of the layers; the first one has the features of the encoder.

        They are those of the encoder (all together, then from the last to the first), and those of the stacked levels.
        """
        return [*self.joint_names, *self.single_names()]

    def single_names(self) -> list[str]:
        """Return the names of the layers without the one that stands for all layers."""
        return [*self.layer_names, *(f"stacked {i + 1}" for i in range(len(self.stacked_levels)))]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the pooled features [B, F] of normalized images [B, 3, S, S] by layer."""
        return {name: tokens.pooled.float() for name, tokens in self.tokens(images).items()}

    def tokens_on_cpu(self, images: Tensor) -> dict[str, LayerTokens]:
        """Return the same as `tokens`, moved to the CPU."""
        return {name: tokens.cpu() for name, tokens in self.tokens(images).items()}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> dict[str, LayerTokens]:
        """Return the tokens of normalized images [B, 3, S, S] by layer, on the device of the images."""
        layers = sorted({*self.depths, *self.encoder.feature_layers})
        stages = dict(zip(layers, self.encoder(images, layers=layers), strict=True))
        groups = [list(stages.values()) for _ in self.joint_names] + [[stages[depth]] for depth in self.layer_names.values()]
        tokens = [LayerTokens(group, self.encoder.pool_stages(group)) for group in groups]
        for level, cells in zip(self.stacked_levels, self.stacked_cells(images, stages[layers[-1]].cells), strict=True):
            tokens.append(LayerTokens([Stage(cells, level.side, 0)], cells.mean(1)))
        return dict(zip(self.names(), tokens, strict=True))

    def stacked_cells(self, images: Tensor, cells: Tensor) -> Iterator[Tensor]:
        """Yield the output [B, side^2, D] of every stacked level, given that of the encoder."""
        given = self.given(images)[-1].cells if self.given and self.stacked_levels else None
        for level in self.stacked_levels:
            below = given if given is not None and level.detach else cells
            cells = level.encoder(pool_cells(below, level.grid, level.pool))
            if given is not None:
                given = level.teacher(pool_cells(given, level.grid, level.pool))
            yield cells

    def blocks(self, name: str) -> tuple[list[Any], int]:
        """Return the transformer blocks that lead to one layer, and the number of summary tokens that pass through them."""
        if name in self.layer_names:
            return self.encoder.attention_blocks(self.layer_names[name]), self.encoder.num_summary_tokens
        number = int(name.removeprefix("stacked "))
        return list(self.stacked_levels[number - 1].encoder.blocks), 0


def model_layers(model: HJEPA, depths: list[int]) -> LayerFeatures:
    """Return the layers of a model, with the encoder's features at these depths."""
    return LayerFeatures(model.encoder, model.upper, depths, model.teacher if model.teacher_is_given else None)


def layer_features(run: TrainedRun, depths: list[int], initial: HJEPA | None = None) -> dict[NetworkKind, LayerFeatures]:
    """Return the layers of the networks of a run, with the encoder's features at these depths.

    Args:
        run: Run.
        depths: Ascending numbers of the encoder's layers.
        initial: Model with the weights that the run started from, to include its layers.
    """
    networks: dict[NetworkKind, LayerFeatures] = {"trained": model_layers(run.model, depths)}
    if initial:
        networks["initial"] = model_layers(initial, depths)
    return networks | {"untrained": LayerFeatures(run.untrained, run.untrained_upper, depths)}
