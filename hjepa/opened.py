"""A run that is looked at afterwards: its model at a checkpoint, the same model before training, and its data.

Every task that reads a run (`run=outputs/default/NAME`) opens it here. What the run is comes from its folder; where and how to
compute comes from the command line (`hardware`, `tracking`, `task`).
"""

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hjepa.assemble import build_model
from hjepa.checkpoint import read
from hjepa.config import Config, build, check
from hjepa.data.dataset import Dataset
from hjepa.encoder import Encoder
from hjepa.errors import UserError
from hjepa.folder import read_config
from hjepa.hardware import Hardware
from hjepa.losses import Objective
from hjepa.masks import Sampler
from hjepa.model import HJEPA
from hjepa.processes.distributed import World
from hjepa.stacked import Upper
from hjepa.weights import refuse_misfit, run_checkpoint


@dataclass(frozen=True)
class Opened:
    """A run at one of its checkpoints, everything on the device and in evaluation mode.

    Attributes:
        folder: of the run; config: its own, as it was trained, but for `hardware` and `tracking`, which are the command's.
        checkpoint: the file; step: optimizer steps that it had taken.
        untrained: the teacher as it was initialised at random; untrained_upper: the stacked levels likewise, None for none.
    """

    folder: Path
    config: Config
    checkpoint: Path
    step: int
    hardware: Hardware
    dataset: Dataset
    model: HJEPA
    sampler: Sampler
    objective: Objective
    untrained: Encoder
    untrained_upper: Upper | None

    @property
    def encoder(self) -> Encoder:
        """The teacher: whose features are probed, looked at and exported."""
        return self.model.teacher

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of the checkpoint file."""
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def open_run(config: Config, checkpoint: str | None, root: str | None) -> Opened:
    """Open the run that `run` names.

    Args:
        checkpoint: name of a checkpoint of the run, such as latest, best or epoch-00005; None takes the best by probe or,
            without one, the latest.
        root: folder of the images, if they are not where they were in training.

    Raises:
        UserError: there is no run, no such checkpoint, or it is of another version of this framework.
    """
    folder = run_folder(config)
    run = whole_config(folder, config, root)
    path = run_checkpoint(folder) if checkpoint is None else folder / "checkpoints" / f"{checkpoint.removesuffix('.pt')}.pt"
    if not path.exists():
        there = sorted(file.stem for file in (folder / "checkpoints").glob("*.pt"))
        raise UserError(
            f"There is no checkpoint {path}; "
            + (f"choose task.checkpoint among {', '.join(there)}." if there else "the run was stopped before its first one.")
        )
    hardware: Hardware = build(run["hardware"])
    hardware.prepare(World())
    dataset: Dataset = build(run["dataset"])
    model, sampler, objective = build_model(run)
    untrained, upper = copy.deepcopy((model.teacher, model.upper))
    if run["teacher"]["_target_"] == "hjepa.teacher.Shared":
        model.share_teacher()
    state = read(path, hardware.device)
    refuse_misfit(model.state_dict(), state["model"], str(path))
    model.load_state_dict(state["model"])
    for module in (model, untrained, *([upper] if upper else [])):
        module.to(hardware.device).eval()
    return Opened(folder, run, path, int(state["step"]), hardware, dataset, model, sampler, objective, untrained, upper)


def run_folder(config: Config) -> Path:
    """The run folder that `run` names."""
    if not config["run"]:
        raise UserError("This task needs a run folder: run=outputs/default/NAME.")
    folder = Path(config["run"]).expanduser().absolute()
    if not (folder / "config.yaml").exists():
        raise UserError(f"run={folder} is no run folder: it has no config.yaml; give one of those that runs name at their ends.")
    return folder


def whole_config(folder: Path, config: Config, root: str | None) -> Config:
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
