"""Images in datasets of Hugging Face are the same as in a folder, and what cannot be read is refused in one sentence."""

import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

from hjepa.config.errors import UserError
from hjepa.data.huggingface import HuggingFaceDataset
from tests.helpers.runs import trainer
from tests.unit.test_data import COMMON, folder, make_folder
from tests.unit.test_stream import options


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package keep its files in a folder of the test, and look for nothing on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write 24 JPEGs of three classes, larger than the images of the run."""
    return make_folder(tmp_path / "images", size=(40, 24))


def table(images: Path, **columns: list[Any]) -> datasets.Dataset:
    """Return the images of a folder in its order, with their classes as `label`, and further columns."""
    files = sorted(images.glob("*/*.jpg"))
    labels = [int(file.parent.name.removeprefix("class")) for file in files]
    classes = datasets.ClassLabel(names=["class0", "class1", "class2"])
    data = datasets.Dataset.from_dict({"image": [str(file) for file in files], "label": labels, **columns})
    return data.cast_column("image", datasets.Image()).cast_column("label", classes)


def dataset(path: Path | str, **chosen: Any) -> HuggingFaceDataset:
    """Return a dataset that the package reads."""
    names = {"subset": None, "revision": None, "train": "train", "test": "test", "image": None, "label": "label"}
    return HuggingFaceDataset(
        str(path), **(names | {"max_corrupt": 0.0, "memory_limit_gb": 1.0, "workers": 0, **COMMON} | chosen)
    )


def write_parquet(images: Path, path: Path) -> Path:
    path.mkdir()
    table(images).to_parquet(path / "train-00000-of-00001.parquet")
    table(images).select(range(12)).to_parquet(path / "test-00000-of-00001.parquet")
    return path


def write_arrow(images: Path, path: Path) -> Path:
    datasets.DatasetDict({"train": table(images), "test": table(images).select(range(12))}).save_to_disk(path)
    return path


def write_file(images: Path, path: Path) -> Path:
    table(images).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_file, lambda images, path: images])
def test_images_and_labels_equal_those_of_the_folder(images: Path, tmp_path: Path, write: Any) -> None:
    data = dataset(write(images, tmp_path / "data"))
    for ours, expected in zip(data.train_and_validation(), folder(images).train_and_validation(), strict=True):
        assert torch.equal(ours.images, expected.images)
        assert torch.equal(ours.labels["class"], expected.labels["class"])
    assert data.class_names("class") == ["class0", "class1", "class2"]
    if write in (write_parquet, write_arrow):
        assert torch.equal(data.load("test").images, folder(images).load("train").images[:12])


def test_batches_from_any_step_on_equal_those_of_the_folder(images: Path, tmp_path: Path) -> None:
    path = write_file(images, tmp_path / "data")
    names = {"dataset=image_folder": "dataset=huggingface", f"dataset.root={images}": f"dataset.path={path}"}
    expected = trainer(*options(images, 0, 1.0))
    stream = trainer(*(names.get(option, option) for option in options(images, 2)))
    for step in (0, 1, 4, 5, 2):
        assert torch.equal(stream.load_images(step), expected.load_images(step))
    stream.close()


def test_columns_of_other_types(images: Path, tmp_path: Path, caplog) -> None:
    """Bytes without the type of an image, and classes as texts and numbers, of which one is missing."""
    files = sorted(images.glob("*/*.jpg"))
    texts = [None, *(file.parent.name for file in files[1:])]
    rows = {
        "photo": [file.read_bytes() for file in files],
        "kind": texts,
        "code": [10 * int(file.parent.name[5:]) for file in files],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    expected = folder(images).load("train")
    split = dataset(tmp_path / "a.parquet", image="photo", label="kind").load("train")
    assert torch.equal(split.images, expected.images)
    assert split.labels["class"].tolist() == [-1, *expected.labels["class"].tolist()[1:]]
    data = dataset(tmp_path / "a.parquet", image="photo", label="code")
    assert torch.equal(data.load("train").labels["class"], expected.labels["class"])
    assert data.class_names("class") == ["0", "10", "20"]
    assert dataset(tmp_path / "a.parquet", image="photo", label=None).load("train").labels == {}


def test_unreadable_images_are_replaced_and_named(images: Path, tmp_path: Path, caplog) -> None:
    file = images / "class1" / "3.jpg"
    file.write_bytes(file.read_bytes()[:200])
    path = write_file(images, tmp_path / "data")
    with pytest.raises(UserError, match=r"1 of 24 images cannot be read.*row 11 \("):
        dataset(path).load("train")
    split = dataset(path, max_corrupt=0.1).load("train")
    assert torch.equal(split.images, folder(images, max_corrupt=0.1).load("train").images)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"image": "picture"}, r"dataset.image=picture does not name the images of .*; its columns of images are image, other\."),
        ({}, r"dataset.image does not name the images of .*; its columns of images are image, other\."),
        (
            {"image": "image", "label": "kind"},
            r"dataset.label=kind: this column of .* does not exist; set it to one of label, score",
        ),
        ({"image": "image", "label": "box"}, r"dataset.label=box: .* does not hold classes; .*null for images without labels"),
        (
            {"image": "image", "train": "training"},
            r"dataset.train=training: .* has no such split; set dataset.train to one of train",
        ),
        ({"path": "nobody/nothing"}, r"dataset.path=nobody/nothing cannot be read .*; expected a dataset on the hub"),
        ({"path": "cut.parquet"}, r"dataset.path=.*cut.parquet cannot be read"),
        ({"path": "missing.parquet"}, r"dataset.path=.*missing.parquet cannot be read"),
    ],
)
def test_what_cannot_be_read_is_explained_in_one_sentence(
    images: Path, tmp_path: Path, chosen: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.parquet"
    others = [str(file) for file in images.glob("*/*.jpg")]
    data = table(images, score=list(range(24)), box=[[0.5, 0.5]] * 24, other=others)
    data.cast_column("other", datasets.Image()).to_parquet(path)
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:500])
    given = chosen.pop("path", path)
    given = tmp_path / given if str(given).endswith(".parquet") else given
    with pytest.raises(UserError, match=message) as caught:
        dataset(given, **chosen).load("train")
    assert "\n" not in str(caught.value)


def test_a_missing_test_split_is_explained(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset.test=test: .* has no such split; .*task.split=validation"):
        dataset(write_file(images, tmp_path / "data")).load("test")


def test_the_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"dataset=huggingface needs the package datasets; pip install datasets"):
        dataset("nobody/nothing").load("train")
