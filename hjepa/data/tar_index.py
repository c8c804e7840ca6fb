"""Images inside of tar files, read in any order: an index says where in its file every image begins.

A tar file has no table of contents, so its headers are read once, and the index is kept in the user's cache folder
(`~/.cache/hjepa`, or below `XDG_CACHE_HOME`) for as long as the file does not change.
"""

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from hjepa.config.errors import UserError, import_optional
from hjepa.data.file_lists import is_hidden, is_image
from hjepa.tracking.atomic import atomic_files

FOLDER = "folder"  # the label that is the name of an image's folder

INDEX_VERSION = 1


class TarIndex(NamedTuple):
    """The images of a tar file in their order, arrays of length N.

    Attributes:
        names: Names of the files in the tar file, bytes.
        offsets: Numbers of bytes before the images, int64.
        sizes: Sizes of the images in bytes, int64.
        labels: Texts of their labels, bytes; empty for an unknown label.
    """

    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class TarImages:
    """Images in several tar files.

    Attributes:
        files: Paths of the tar files.
        file_of: For every image, which of these files it is in, int32 [N].
        names: See `TarIndex`.
        offsets: See `TarIndex`.
        sizes: See `TarIndex`.
    """

    files: list[str]
    file_of: np.ndarray
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    @classmethod
    def join(cls, files: list[str], indices: list[TarIndex]) -> Self:
        """Return the images of several tar files, given their indices."""
        file_of = np.repeat(np.arange(len(files), dtype=np.int32), [len(index.names) for index in indices])
        names, offsets, sizes, _ = map(np.concatenate, zip(*indices, strict=True))
        return cls(files, file_of, names, offsets, sizes)

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Tensor) -> "TarImages":
        positions = index.numpy()
        return TarImages(self.files, *(column[positions] for column in (self.file_of, self.names, self.offsets, self.sizes)))

    def name(self, position: int) -> str:
        return f"{self.files[self.file_of[position]]}, {os.fsdecode(self.names[position])}"

    def open(self, position: int) -> BinaryIO:
        size = int(self.sizes[position])
        with Path(self.files[self.file_of[position]]).open("rb", buffering=0) as file:
            file.seek(int(self.offsets[position]))
            content = file.read(size)
        if len(content) < size:
            raise OSError("the tar file has become shorter since the run began")
        return io.BytesIO(content)


def tar_index(path: Path, image: str | None, label: str | None) -> TarIndex:
    """Return the index of a tar file, from the cache if it is there.

    Args:
        path: Tar file.
        image: Extension of the images; None: the only image of every sample.
        label: Extension of the files that hold the labels, `FOLDER`, or None for images without labels.

    Raises:
        UserError: The file is no tar file, is cut off, or its samples have several images.
    """
    stat = path.stat()
    key = repr((INDEX_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, image, label))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hjepa" / "tar-index"
    cached = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    index = read_cached(cached)
    if index is not None:
        return index
    index = read_index(path, image, label)
    with contextlib.suppress(OSError):  # a home folder without space: the next run reads the headers again
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_files(cached) as (temporary,), temporary.open("wb") as file:
            np.savez(file, **index._asdict())
    return index


def read_cached(file: Path) -> TarIndex | None:
    """Return the index in a file of the cache; None if there is none or it is damaged."""
    try:
        with np.load(file) as arrays:
            return TarIndex(**arrays)
    except (OSError, ValueError, EOFError, KeyError, TypeError, BadZipFile):
        return None


def read_index(path: Path, image: str | None, label: str | None) -> TarIndex:
    """Read the headers of a tar file; see `tar_index`."""
    group_by_keys = import_webdataset("webdataset.tariterators").group_by_keys
    rows: list[tuple[bytes, int, int, bytes]] = []
    # In a tar file of folders, every file is a sample of its own, whatever dots its name contains.
    grouping = {"keys": lambda name: (name, Path(name).suffix[1:])} if label == FOLDER else {}
    with open_tar(path) as tar:
        try:
            for sample in group_by_keys(members(tar, path), **grouping):
                if member := image_member(sample, path, image):
                    text = label_text(sample, tar, label)
                    rows.append((os.fsencode(member.name), member.offset_data, member.size, text))
        except ValueError as error:  # of `group_by_keys`
            raise UserError(
                f"{path} holds files that differ in nothing but case or have the same name ({error.args[0]})."
            ) from error
    names, offsets, sizes, labels = zip(*rows, strict=True) if rows else ((), (), (), ())
    return TarIndex(
        np.array(names, dtype=bytes), np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(labels, dtype=bytes)
    )


def import_webdataset(module: str) -> Any:
    """Import a module of the package `webdataset`, which knows the conventions of its tar files."""
    return import_optional(module, "dataset=webdataset", "unpack the tar files and use dataset=image_folder")


def open_tar(path: Path) -> tarfile.TarFile:
    """Open an uncompressed tar file."""
    try:
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} is no uncompressed tar file ({error}); if it is compressed, decompress it, since images are read in any "
            "order; else copy or download it again."
        ) from error


def members(tar: tarfile.TarFile, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar file that are data, as `webdataset` expects them.

    Raises:
        UserError: The tar file is cut off, or two of its files have the same name.
    """
    end = path.stat().st_size
    try:
        for member in tar:
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"the end of {member.name} is missing")
            name = member.name.removeprefix("./")
            if member.isreg() and not any(map(is_hidden, name.split("/"))):
                yield {"fname": name, "data": member, "__url__": str(path)}
        if tar.offset + tarfile.BLOCKSIZE > end:
            raise tarfile.ReadError("the mark of its end is missing")
    except tarfile.TarError as error:
        raise UserError(f"{path} is cut off or damaged ({error}); copy or download it again.") from error


def image_member(sample: dict[str, Any], path: Path, image: str | None) -> tarfile.TarInfo | None:
    """Return the image of a sample, None if it has none."""
    if image is not None:
        return sample.get(image.lower().lstrip("."))
    extensions = [extension for extension in sample if is_image(f".{extension}")]
    if len(extensions) > 1:
        raise UserError(
            f"{path}: {sample['__key__']} has several images ({', '.join(sorted(extensions))}); choose one kind, for example "
            f"dataset.image={extensions[0]}."
        )
    return sample[extensions[0]] if extensions else None


def label_text(sample: dict[str, Any], tar: tarfile.TarFile, label: str | None) -> bytes:
    """Return the text of a sample's label; empty if it has none."""
    if label is None:
        return b""
    if label == FOLDER:
        return os.fsencode(Path(sample["__key__"]).parent.name)
    member = sample.get(label.lower().lstrip("."))
    content = tar.extractfile(member) if member else None
    return content.read().strip() if content else b""
