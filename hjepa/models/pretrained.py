"""Weights from elsewhere: an encoder's from a run or a timm checkpoint file, a whole model's from a run."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.vit import ViTEncoder

Weights = dict[str, Tensor]

CPU = torch.device("cpu")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint to take from a run folder: the best by probe or, without one, the latest; files are taken as they are."""
    if not path.is_dir():
        return path
    best, latest = (path / "checkpoints" / name for name in ("best.pt", "latest.pt"))
    return best if best.exists() else latest


def read_encoder(source: str, option: str) -> Weights:
    """The teacher's weights of a run, or a timm checkpoint file's (safetensors, or a state dict that torch saved)."""
    path = find_checkpoint(Path(source).expanduser())
    if not path.is_file():
        raise UserError(f"{option}={source}: there is no such file or run folder with checkpoints.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location=CPU, weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign files
        raise UserError(f"{option}={source} cannot be read as a checkpoint ({type(error).__name__}).") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
        ours = {name.removeprefix("teacher."): value for name, value in state.items() if name.startswith("teacher.")}
        return ours or state
    return dict(state)


def load_encoder(encoder: ViTEncoder, source: str, option: str) -> None:
    """Load an encoder's weights, whatever `read_encoder` takes; heads and class tokens of a classifier are left out.

    Args:
        option: the config key that names the source, for the error message.
    """
    given = read_encoder(source, option)
    given = {name: value for name, value in given.items() if not name.startswith(("head.", "fc_norm.", "cls_token"))}
    own = encoder.state_dict()
    if "pos_embed" in given and math.isqrt(positions := given["pos_embed"].shape[1]) ** 2 == positions - 1:
        given["pos_embed"] = given["pos_embed"][:, 1:]  # of the class token, which is not here
    if "pos_embed" in given and "patch_embed.proj.weight" in given:
        given = checkpoint_filter_fn(given, encoder)  # other image and patch sizes are resampled
    if "reg_token" not in given and "reg_token" in own:
        given["reg_token"] = own["reg_token"]
    check_fits(own, given, f"{option}={source}")
    encoder.load_state_dict(given)


def load_stacked_teachers(model: nn.Module, source: str) -> None:
    """Load the teachers of the stacked levels from a run with the same ones; other files have none."""
    given: Weights = read(find_checkpoint(Path(source).expanduser()), CPU)["model"]
    own = {name: value for name, value in model.state_dict().items() if ".teacher." in name}
    ours = {name: value for name, value in given.items() if ".teacher." in name}
    check_fits(own, ours, f"teacher.weights={source}")
    model.load_state_dict(ours, strict=False)


def load_model(model: nn.Module, source: str) -> None:
    """Load all of a run's model, from its folder or one of its checkpoints."""
    path = find_checkpoint(Path(source).expanduser())
    weights: Weights = read(path, CPU)["model"]
    check_fits(model.state_dict(), weights, f"init_from={source}")
    model.load_state_dict(weights)


def check_fits(own: Weights, given: Weights, what: str) -> None:
    """Refuse weights of another architecture, naming what is missing, foreign or of another shape."""
    missing, foreign = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    other = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in given and own[k].shape != given[k].shape
    ]
    found = [
        f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in (("lacks", missing), ("has the unknown", foreign), ("has", other))
        if names
    ]
    if found:
        raise UserError(f"{what} does not fit the model: it {'; it '.join(found)}. Choose model and levels as they were there.")


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """Load a checkpoint, weights only (nothing in it is executed); refuse anything that is none of ours."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; expected a .pt file that a run wrote in its checkpoints/ folder.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign files
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); restore it or start anew.") from error
    missing = sorted({"identity", "step", "model", "optimizer"} - set(state if isinstance(state, dict) else ()))
    if missing:
        raise UserError(f"{path} is no checkpoint of this framework: it lacks {', '.join(missing)}.")
    return state
