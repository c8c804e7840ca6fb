"""Lists of image files: which files and folders below a folder are data, in a fixed order.

Everything that lists images uses this module: class folders, folders of images without classes, and `task=features`. Left out
are hidden files and folders (whose names begin with a dot, such as `.ipynb_checkpoints` and the `._` files of macOS), those of
operating systems and storage devices, output folders of hjepa, pipes, sockets, and links that lead back to a folder above them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from hjepa.config.errors import UserError

FileList = tuple[list[str], list[int]]  # paths and class indices

# Folders of macOS archives, Windows, Linux file systems, and network drives (Synology, QNAP), in lower case.
SYSTEM_NAMES = (
    "__macosx",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "@eadir",
    "@recycle",
    "#recycle",
    "#snapshot",
)

RUNS = ("metrics.jsonl", "*/metrics.jsonl", "*/*/metrics.jsonl")  # below a run folder, an experiment, and output_root


class Folder:
    """The images and subfolders of a folder that are data, without those of its subfolders.

    Args:
        path: The folder; it is listed whatever its own name is.
        above: Real paths of the folders above it, to which links may not lead back.

    Attributes:
        images: Sorted names of the images.
        folders: Sorted names of the subfolders.
        above: Real paths of this folder and of the folders above it.

    Raises:
        UserError: The folder cannot be listed.
    """

    def __init__(self, path: Path, above: frozenset[str] = frozenset()) -> None:
        real = Path(os.path.realpath(path))
        self.path, self.above = path, above | {str(real), *map(str, real.parents)}
        entries = sorted((entry for entry in scan(path) if not is_hidden(entry.name)), key=lambda entry: entry.name)
        folders = [entry for entry in entries if is_folder(entry)]
        self.folders = [entry.name for entry in folders if not self.leads_back(entry) and not holds_runs(Path(entry.path))]
        others = {entry.name for entry in folders}
        files = [entry for entry in entries if entry.name not in others and (entry.is_symlink() or entry.is_file())]
        self.images = [entry.name for entry in files if is_image(entry.name)]

    def leads_back(self, entry: os.DirEntry[str]) -> bool:
        """Return whether a subfolder is a link to this folder or to one above it."""
        return entry.is_symlink() and os.path.realpath(entry) in self.above

    def walk(self) -> Iterator[tuple[str, str]]:
        """Yield the folder and the name of every image, also those in subfolders."""
        yield from ((str(self.path), name) for name in self.images)
        for name in self.folders:
            yield from Folder(self.path / name, self.above).walk()


def scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder; raise `UserError` if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); check its permissions, or move it elsewhere.") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one."""
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()  # `entry` raises for a link to itself


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is no data because of its name."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Return whether a file has the name of an image."""
    return name.lower().endswith(IMG_EXTENSIONS)


def holds_runs(folder: Path) -> bool:
    """Return whether a folder is a run folder, or holds run folders at most two levels down, and no images beside them."""
    if any(is_image(entry.name) for entry in scan(folder)):
        return False
    return any((file.parent / "config.yaml").exists() for pattern in RUNS for file in folder.glob(pattern))


def walk_images(folder: Path) -> list[str]:
    """Return the paths of all images in a folder and its subfolders, sorted by their folders, then by name."""
    return [f"{parent}{os.sep}{name}" for parent, name in sorted(Folder(folder.absolute()).walk())]


def class_folders(folder: Path, chosen: list[str] | None) -> list[str]:
    """Return the names of all class folders, or of the chosen ones, in the order of their class indices.

    A chosen name that is no folder stands for its first word, since lists of classes often describe them: `n01440764 tench`.

    Raises:
        UserError: A chosen class has no folder.
    """
    classes = Folder(folder).folders
    if chosen is None:
        return classes
    names = {name: name if name in classes else (name.split() or [""])[0] for name in chosen}
    if missing := sorted(name for name, first_word in names.items() if first_word not in classes):
        raise UserError(
            f"dataset.classes: {folder} has no class folder {missing[0]} ({len(missing)} of {len(names)} are missing); "
            "use names of existing folders."
        )
    return sorted(set(names.values()))


def list_images(folder: Path, chosen: list[str] | None = None) -> FileList:
    """Return the sorted paths and the class indices of all images in the (chosen) class folders.

    Without class folders, images in the folder itself are returned with the class -1.

    Raises:
        UserError: There are no images.
    """
    classes = class_folders(folder, chosen)
    if not classes:
        unlabeled = [str(folder / name) for name in Folder(folder).images]
        if not unlabeled:
            raise UserError(f"{folder} holds neither images nor class folders; expected {folder}/<class>/*.jpg.")
        return unlabeled, [-1] * len(unlabeled)
    images = [walk_images(folder / name) for name in classes]
    if not any(images):
        raise UserError(f"The class folders of {folder} hold no images (looked for {', '.join(IMG_EXTENSIONS)}).")
    return [path for paths in images for path in paths], [label for label, paths in enumerate(images) for _ in paths]
