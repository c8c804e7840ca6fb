"""Images in tar files are the same as in a folder, in any order, and bad tar files are refused in one sentence."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from webdataset import TarWriter

from hjepa.config.errors import UserError
from hjepa.data.image_files import ImageFiles
from hjepa.data.tar_index import tar_index
from hjepa.data.webdataset import WebDataset
from tests.helpers.runs import trainer
from tests.unit.test_data import COMMON, folder, make_folder
from tests.unit.test_stream import options

LABELS: dict[str, Callable[[Path], str]] = {
    "cls": lambda file: file.parent.name.removeprefix("class"),
    "txt": lambda file: file.parent.name,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep indices in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write 24 JPEGs of three classes, larger than the images of the run."""
    return make_folder(tmp_path / "images", size=(40, 24))


def write_tars(images: Path, root: Path, name: str = "shard-{:03d}.tar", size: int = 10) -> Path:
    """Write the images of a folder to tar files of at most `size` images, in their order and with labels of both kinds."""
    root.mkdir(exist_ok=True)
    files = sorted(images.glob("*/*.jpg"))
    for number, first in enumerate(range(0, len(files), size)):
        with TarWriter(str(root / name.format(number))) as tar:
            for file in files[first : first + size]:
                labels = {extension: label(file) for extension, label in LABELS.items()}
                tar.write({"__key__": f"{file.parent.name}/{file.stem}", "jpg": file.read_bytes(), **labels})
    return root


@pytest.fixture
def root(images: Path, tmp_path: Path) -> Path:
    return write_tars(images, tmp_path / "tars")


def tars(root: Path, **chosen: Any) -> WebDataset:
    """Return a dataset of tar files."""
    common = {"max_corrupt": 0.0, "memory_limit_gb": 1.0, "workers": 0, **COMMON}
    return WebDataset(str(root), **({"train": None, "test": None, "image": None, "label": "cls", **common} | chosen))


@pytest.mark.parametrize("label", ["cls", "txt", ".TXT", "folder"])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_images_and_labels_equal_those_of_the_folder(images: Path, root: Path, label: str, limit: float) -> None:
    data = tars(root, label=label, memory_limit_gb=limit)
    for ours, expected in zip(data.train_and_validation(), folder(images).train_and_validation(), strict=True):
        assert torch.equal(ours.images[:], expected.images)
        assert torch.equal(ours.labels["class"], expected.labels["class"])
    assert data.class_names("class") == (["0", "1", "2"] if label == "cls" else ["class0", "class1", "class2"])
    assert torch.equal(data.sample(5), folder(images).sample(5))


def test_batches_from_any_step_on_equal_those_of_the_folder(images: Path, root: Path) -> None:
    """A run resumes at its next image, since the images of a step depend on the step alone."""
    names = {"dataset=image_folder": "dataset=webdataset", f"dataset.root={images}": f"dataset.root={root}"}
    expected = trainer(*options(images, 0, 1.0))
    stream = trainer(*(names.get(option, option) for option in options(images, 2)))
    for step in (0, 1, 4, 5, 2):
        assert torch.equal(stream.load_images(step), expected.load_images(step))
    stream.close()


def test_splits_are_found_by_their_names_or_given(images: Path, tmp_path: Path) -> None:
    root = write_tars(images, tmp_path / "tars", "train-{:03d}.tar")
    write_tars(images, root, "val-{:03d}.tar", 24)
    for given in (
        {},
        {"train": "train-{000..002}.tar", "test": [str(root / "val-000.tar")]},
        {"train": "train-*.tar", "test": "v*.tar"},
    ):
        data = tars(root, **given)
        assert (len(data.load("train")), len(data.find_files("train"))) == (24, 3)
        assert (len(data.load("test")), len(data.find_files("test"))) == (24, 1)


def test_numbers_of_classes_are_sorted_as_numbers(tmp_path: Path, images: Path) -> None:
    content = next(images.rglob("*.jpg")).read_bytes()
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        for number in (10, 9, 100):
            tar.write({"__key__": str(number), "jpg": content, "cls": str(number)})
        tar.write({"__key__": "unknown", "jpg": content})
    data = tars(tmp_path)
    assert data.class_names("class") == ["9", "10", "100"]
    assert data.load("train").labels["class"].tolist() == [1, 0, 2, -1]


def test_a_tar_file_of_plain_folders_is_read(images: Path, tmp_path: Path) -> None:
    """As `tar` writes it, with folders, links and the files that macOS adds."""
    (images / "class0" / "._0.jpg").write_bytes(b"macOS")
    os.link(images / "class0" / "0.jpg", images / "class0" / "again.jpg")
    (images / "class1" / "1.jpg").rename(images / "class1" / "7.5.jpg")  # not a sample with the one before
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(images, ".")
    (images / "class0" / "again.jpg").unlink()
    split = tars(tmp_path, label="folder").load("train")
    assert sorted(split.labels["class"].tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    assert set(map(bytes, split.images.flatten(1).numpy())) == set(
        map(bytes, folder(images).load("train").images.flatten(1).numpy())
    )


def test_an_index_is_kept_until_the_tar_file_changes(root: Path, images: Path, cache: Path) -> None:
    before = tars(root).load("train")
    kept = sorted(cache.rglob("*.npz"))
    assert len(kept) == 3
    times = [file.stat().st_mtime_ns for file in kept]
    assert torch.equal(tars(root).load("train").images, before.images)
    assert [file.stat().st_mtime_ns for file in kept] == times
    for content in (b"damaged", b""):
        kept[0].write_bytes(content)
        assert torch.equal(tars(root).load("train").images, before.images)
    for file in root.iterdir():
        file.unlink()
    write_tars(images, root, size=12)
    after = tars(root)
    assert torch.equal(after.load("train").images, before.images)
    assert len(after.find_files("train")) == 2


def test_an_index_that_cannot_be_kept_leaves_no_file(root: Path, cache: Path, monkeypatch) -> None:
    def savez(file: Any, **arrays: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hjepa.data.tar_index.np.savez", savez)
    tars(root).load("train")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_unreadable_images_are_replaced_and_named(root: Path, images: Path, tmp_path: Path, caplog) -> None:
    file = images / "class1" / "3.jpg"
    file.write_bytes(file.read_bytes()[:200])
    write_tars(images, root)
    with pytest.raises(UserError, match=r"1 of 24 images cannot be read.*shard-001.tar, class1/3.jpg \("):
        tars(root).load("train")
    split = tars(root, max_corrupt=0.1).load("train")
    assert torch.equal(split.images, folder(images, max_corrupt=0.1).load("train").images)
    assert "shard-001.tar, class1/3.jpg" in caplog.text


def test_a_tar_file_that_shrinks_during_a_run_is_named(root: Path) -> None:
    files = tars(root, memory_limit_gb=0.0).load("train").images
    assert isinstance(files, ImageFiles)
    os.truncate(root / "shard-001.tar", 4096)
    with pytest.raises(UserError, match=r"shard-001.tar, class\d/\d.jpg \(the tar file has become shorter"):
        files[:]


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.77, 0.9])
def test_a_tar_file_that_is_cut_off_is_refused(root: Path, share: float) -> None:
    file = root / "shard-001.tar"
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + tarfile.BLOCKSIZE
    os.truncate(file, int(share * end))
    with pytest.raises(UserError, match=r"shard-001.tar is (cut off|no uncompressed tar file)"):
        tars(root).load("train")


def test_a_tar_file_that_is_cut_off_between_two_files_is_refused(root: Path) -> None:
    with tarfile.open(root / "shard-001.tar") as tar:
        offsets = [member.offset for member in tar]
    os.truncate(root / "shard-001.tar", offsets[5])
    with pytest.raises(UserError, match=r"shard-001.tar is cut off or damaged \(the mark of its end is missing\)"):
        tars(root).load("train")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """Write a tar file."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"root": "nowhere"}, r"dataset.root=.*nowhere is not a folder"),
        ({"train": "t-*.tar"}, r"dataset.train=t-\*.tar: no file matches in .*tars; "),
        ({"train": "shard-{000..004}.tar"}, r"2 of 5 files are missing, for example .*shard-003.tar"),
        ({"train": "shard-{000..tar"}, r"dataset.train=.* is no pattern"),
        ({"train": ["s3://bucket/a.tar"]}, r"is no local file; download the tar files, or mount"),
        ({"train": "pipe:cat a.tar"}, r"is no local file"),
        ({"label": "json"}, r"dataset.label=json: no image in the tar files of .* has such a label; .*probe=none"),
        ({"image": "png"}, r"hold no images"),
        ({"train": "empty.tar"}, r"empty.tar is no uncompressed tar file"),
        ({"train": "packed.tar"}, r"packed.tar is no uncompressed tar file .*decompress"),
        (
            {"train": "pairs.tar"},
            r"pairs.tar: a has several images \(jpg, mask.png\); choose one kind, for example dataset.image=jpg",
        ),
        ({"train": "twice.tar"}, r"twice.tar holds files that .* have the same name"),
        (
            {"train": "shard-000.tar", "test": "other.tar"},
            r"dataset.test: .* class 7 \(1 such classes\).* the training split has none",
        ),
    ],
)
def test_what_cannot_be_read_is_explained_in_one_sentence(root: Path, chosen: dict[str, Any], message: str) -> None:
    (root / "empty.tar").touch()
    (root / "packed.tar").write_bytes(gzip.compress((root / "shard-000.tar").read_bytes()))
    write_tar(root / "pairs.tar", {"a.jpg": b"x", "a.mask.png": b"x", "a.cls": b"0"})
    write_tar(root / "twice.tar", {"a.jpg": b"x", "a.JPG": b"x"})
    write_tar(root / "other.tar", {"a.jpg": b"x", "a.cls": b"7"})
    data = tars(root / chosen.pop("root", ""), **({"train": "shard-*.tar"} | chosen))
    with pytest.raises(UserError, match=message) as caught:
        data.load("test" if "test" in chosen else "train")
    assert "\n" not in str(caught.value)


def test_a_missing_test_split_is_explained(root: Path) -> None:
    with pytest.raises(UserError, match=r"has no \*test\*.tar or \*val\*.tar; set dataset.test.*task.split=validation"):
        tars(root).load("test")


def test_images_without_labels(root: Path) -> None:
    assert tars(root, label=None).load("train").labels == {}


def test_names_of_classes_may_have_any_encoding(root: Path) -> None:
    write_tar(root / "latin.tar", {"a.jpg": b"x", "a.cls": "caf\u00e9".encode("latin-1"), "b.jpg": b"x", "b.cls": b"tea"})
    assert tars(root, train="latin.tar").class_names("class") == ["caf\ufffd", "tea"]


def test_the_missing_package_is_named(root: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset.tariterators", None)
    with pytest.raises(UserError, match=r"dataset=webdataset needs the package webdataset; pip install webdataset"):
        tar_index(root / "shard-000.tar", None, "cls")
