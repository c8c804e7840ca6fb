"""Weights from files: those of an encoder from a run or any other trainer, and those of a whole model from a run."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hjepa.config.errors import UserError
from hjepa.models.encoder import Encoder
from hjepa.models.find_encoder import Weights, find_differences, find_encoder
from hjepa.models.weight_files import find_checkpoint, find_weights, read_weight_file

CPU = torch.device("cpu")


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Load a checkpoint of a run without executing anything in it (`weights_only`).

    Raises:
        UserError: If the file does not exist, cannot be read, or is not a checkpoint of this framework.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; expected a .pt file that a run wrote to its checkpoints/ folder.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign files
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); restore the file or start a new run."
        ) from error
    missing = sorted({"identity", "step", "model", "optimizer"} - set(state if isinstance(state, dict) else ()))
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this framework: it lacks {', '.join(missing)}. "
            "(model.pretrained starts the encoder from checkpoints of other trainers.)"
        )
    return state


def load_encoder(encoder: Encoder, source: str, option: str, key: str | None = None) -> None:
    """Load weights into an encoder: those of the encoder that a run evaluates, of timm, or of a checkpoint of another trainer.

    Args:
        encoder: Encoder to change.
        source: Run folder, export folder or file.
        option: Config key that names the source, for messages; the one that names `key` ends in `_key`.
        key: Entry or prefix of the checkpoint to take, such as "student"; None finds it.

    Raises:
        UserError: If there is no such file, it cannot be read safely, or its weights do not fit the encoder.
    """
    path, given = find_weights(Path(source).expanduser()), f"{option}={source}"
    if not path.is_file():
        raise UserError(f"{given}: no such file or run folder with checkpoints exists.")
    content = read_weight_file(path, given)
    if key is None and trained_by_given_teacher(content):
        key = "student"
    encoder.load_state_dict(find_encoder(content, encoder, key, given, f"{option}_key"))


def trained_by_given_teacher(content: Any) -> bool:
    """Return whether a file is the checkpoint of a run whose teacher never changed, so that its student is what it trained."""
    identity = content.get("identity") if isinstance(content, dict) else None
    target = identity.get("teacher", {}).get("_target_") if isinstance(identity, dict) else None
    return target == "hjepa.training.Frozen"


def load_initial_weights(encoder: Encoder, pretrained: str | None, pretrained_key: str | None) -> None:
    """Do what `load_encoder` does for `model.pretrained` and `model.pretrained_key`, or nothing if both are None."""
    if pretrained:
        load_encoder(encoder, pretrained, "model.pretrained", pretrained_key)
    elif pretrained_key is not None:
        raise UserError(f"model.pretrained_key={pretrained_key} chooses a part of a checkpoint: set model.pretrained too.")


def load_stacked_teachers(model: nn.Module, source: str) -> None:
    """Load the teachers of the stacked levels from a run with the same levels; other files contain no such weights."""
    checkpoint: Weights = read_checkpoint(find_checkpoint(Path(source).expanduser()), CPU)["model"]
    own, weights = (
        {name: value for name, value in state.items() if ".teacher." in name} for state in (model.state_dict(), checkpoint)
    )
    check_fits(own, weights, f"teacher.weights={source}")
    model.load_state_dict(weights, strict=False)


def load_model(model: nn.Module, source: str) -> None:
    """Load the whole model of a run from its folder or one of its checkpoints."""
    checkpoint = read_checkpoint(find_checkpoint(Path(source).expanduser()), CPU)
    weights: Weights = checkpoint["model"]
    if trained_by_given_teacher(checkpoint):
        trained = {name.replace("student.", "teacher.", 1): value for name, value in weights.items() if "student." in name}
        weights = weights | {name: value for name, value in trained.items() if name in weights}
    check_fits(model.state_dict(), weights, f"init_from={source}")
    model.load_state_dict(weights)


def check_fits(expected: Weights, weights: Weights, source: str) -> None:
    """Raise `UserError` for weights of another architecture, naming missing and unknown keys and other shapes.

    Args:
        expected: State dict of the model.
        weights: State dict to load.
        source: Origin of the weights, for the message.
    """
    differences = find_differences(expected, weights)
    if differences:
        raise UserError(
            f"{source} does not fit the model: it {'; it '.join(differences)}. Choose the same model and levels as in the source."
        )
