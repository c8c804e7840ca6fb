"""Read files of weights without executing anything in them: safetensors, and what `torch.save` wrote."""

import argparse
import re
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hjepa.config.errors import UserError, first_line

# Checkpoints of other trainers often hold their options besides the weights. Neither class executes anything of its own.
HARMLESS: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]

HUB_FILES = ("model.safetensors", "encoder.safetensors", "pytorch_model.bin")  # of an export, or a repository of a model hub

GIT_LFS = b"version https://git-lfs"


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint of a run folder, the best by probe or else the latest; return any other path unchanged."""
    if not path.is_dir():
        return path
    best, latest = (path / "checkpoints" / name for name in ("best.pt", "latest.pt"))
    return best if best.exists() else latest


def find_weights(path: Path) -> Path:
    """Return the file of weights in a folder of an export or a model hub; in any other case do what `find_checkpoint` does."""
    return next((path / name for name in HUB_FILES if (path / name).is_file()), find_checkpoint(path))


def read_weight_file(path: Path, source: str) -> Any:
    """Return the content of a file on the CPU: tensors by name, possibly in nested dictionaries and among other values.

    Args:
        path: File.
        source: Option and value that name it, for error messages.

    Raises:
        UserError: If it cannot be read, or only by executing code that it contains.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS))
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); change its permissions or copy it.") from error
    if start == GIT_LFS:
        raise UserError(f"{source} is a pointer of Git LFS instead of the weights; fetch them with git lfs pull.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source} cannot be read as safetensors ({first_line(error)}); fetch the file again.") from error
    if is_torchscript(path):
        raise UserError(
            f"{source} is a TorchScript program, which is code. If you trust where it comes from, save its weights alone: "
            f"""python -c "import torch; torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth')" """
            "and use weights.pth."
        )
    with torch.serialization.safe_globals(HARMLESS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for foreign files
            raise UserError(explain_refusal(path, source, error)) from error


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of TorchScript, by the entry that distinguishes it from other archives of torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def explain_refusal(path: Path, source: str, error: Exception) -> str:
    """Return why torch does not load a file as weights, and what to do."""
    names = unsafe_names(path, error)
    if not names:
        return (
            f"{source} cannot be read as a checkpoint ({type(error).__name__}); expected safetensors or a complete file of "
            "torch.save, so fetch the file again or convert it."
        )
    return (
        f"{source} is refused: besides tensors it contains {' and '.join(names)}, and to load such objects, Python may execute "
        "code from the file. If you trust where it comes from, save its weights alone where that code is installed: "
        f"""python -c "import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); """
        """torch.save(c['state_dict'], 'weights.pth')" """
        "(with the name of the entry that holds the weights; c.state_dict() if c is a module), and use weights.pth."
    )


def unsafe_names(path: Path, error: Exception) -> list[str]:
    """Return the classes and functions in a pickle that `weights_only` does not allow; at most three, and how many more."""
    names = re.findall(r"\bGLOBAL (\w[\w.]*)", str(error))
    if isinstance(error, UnpicklingError) and zipfile.is_zipfile(path):
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or names
    return [", ".join(names[:3]), f"{len(names) - 3} more"] if len(names) > 3 else names
