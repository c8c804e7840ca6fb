"""Weights from files: those of an encoder from a run or a checkpoint of timm, and those of a whole model from a run."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.encoder import Encoder

Weights = dict[str, Tensor]

CPU = torch.device("cpu")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint of a run folder, the best by probe or else the latest; return any other path unchanged."""
    if not path.is_dir():
        return path
    best, latest = (path / "checkpoints" / name for name in ("best.pt", "latest.pt"))
    return best if best.exists() else latest


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
        raise UserError(f"{path} is not a checkpoint of this framework: it lacks {', '.join(missing)}.")
    return state


def read_encoder(source: str, option: str) -> Weights:
    """Read the weights of a run's teacher, or those in a file of timm (safetensors, or a state dict saved by torch).

    Args:
        source: Run folder or file.
        option: Config key that names the source, for error messages.
    """
    path = find_checkpoint(Path(source).expanduser())
    if not path.is_file():
        raise UserError(f"{option}={source}: no such file or run folder with checkpoints exists.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location=CPU, weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign files
        raise UserError(f"{option}={source} cannot be read as a checkpoint ({type(error).__name__}).") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
        teacher = {name.removeprefix("teacher."): value for name, value in state.items() if name.startswith("teacher.")}
        return teacher or state
    return dict(state)


def load_encoder(encoder: Encoder, source: str, option: str) -> None:
    """Load the weights that `read_encoder` returns, converted by the encoder's `adapt_state_dict`.

    Args:
        encoder: Encoder to change.
        source: Run folder or file.
        option: Config key that names the source, for error messages.

    Raises:
        UserError: If the weights do not fit the encoder.
    """
    weights = encoder.adapt_state_dict(read_encoder(source, option))
    check_fits(encoder.state_dict(), weights, f"{option}={source}")
    encoder.load_state_dict(weights)


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
    weights: Weights = read_checkpoint(find_checkpoint(Path(source).expanduser()), CPU)["model"]
    check_fits(model.state_dict(), weights, f"init_from={source}")
    model.load_state_dict(weights)


def check_fits(expected: Weights, weights: Weights, source: str) -> None:
    """Raise `UserError` for weights of another architecture, naming missing and unknown keys and other shapes.

    Args:
        expected: State dict of the model.
        weights: State dict to load.
        source: Origin of the weights, for the message.
    """
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and value.shape != weights[key].shape
    ]
    differences = [
        f"{verb} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for verb, names in (("lacks", missing), ("has the unknown", unknown), ("has", shapes))
        if names
    ]
    if differences:
        raise UserError(
            f"{source} does not fit the model: it {'; it '.join(differences)}. Choose the same model and levels as in the source."
        )
