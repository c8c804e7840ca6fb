"""Datasets of folders and archives, their splits, and normalization."""

import hashlib
import io
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build
from hjepa.config.schema import check, check_node, resolve
from hjepa.data.augment import Augment
from hjepa.data.checks import check_images_differ
from hjepa.data.datamodule import evenly_spaced_indices, stratified_indices
from hjepa.data.image_folder import FolderMixture, ImageFolder, ImageNet
from hjepa.data.shapes import Shapes
from hjepa.data.torchvision_datasets import TorchvisionDataset
from hjepa.metrics.probes import Probe
from tests.helpers.runs import compose

COMMON = {
    "image_size": 16,
    "validation": 0.25,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "augment": Augment([1.0, 1.0], [1.0, 1.0], 0.0),
    "views": 1,
    "local_views": 0,
    "local_size": 16,
    "local_scale": [0.05, 0.3],
}


def make_folder(root: Path, classes: int = 3, images: int = 8, size: tuple[int, int] = (16, 16), kind: str = "jpg") -> Path:
    """Write images into class folders; the images of a class are brighter than those of the class before."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 50, (size[1], size[0], 3), dtype=np.uint8) + 70 * c
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{c}" / f"{i}.{kind}")
    return root


def folder(root: Path, **options: object) -> ImageFolder:
    """Return a small image folder dataset."""
    return ImageFolder(
        str(root), **({"classes": None, "max_corrupt": 0.0, "memory_limit_gb": 1.0, "workers": 0, **COMMON} | options)
    )


def pixels(image: torch.Tensor) -> bytes:
    """Return the pixels of an image in a hashable form."""
    return image.numpy().tobytes()


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_folder_images_and_labels(tmp_path: Path, kind: str) -> None:
    split = folder(make_folder(tmp_path, kind=kind)).load("train")
    assert split.images.shape == (24, 3, 16, 16)
    assert split.labels["class"].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    means = split.images.float().mean((1, 2, 3)).view(3, 8).mean(1)
    assert (means.diff() > 50).all(), "pixels belong to their labels"


def test_other_sizes_are_resized_and_cropped_to_the_center(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "0.png")
    image = folder(tmp_path).load("train").images[0]
    assert image.shape == (3, 16, 16)
    assert (image[:, :, 1:-1] > 240).all()


def test_train_and_test_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", images=2)
    data = folder(tmp_path)
    assert len(data.load("train")) == 24
    assert len(data.load("test")) == 6


def test_val_is_another_name_of_the_test_split(tmp_path: Path) -> None:
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", images=2)
    assert len(folder(tmp_path).load("test")) == 6
    make_folder(tmp_path / "test", images=1)
    assert len(folder(tmp_path).load("test")) == 3
    missing = make_folder(tmp_path / "half" / "val").parent
    with pytest.raises(UserError, match="has no train/ folder"):
        folder(missing).load("train")


def test_chosen_classes(tmp_path: Path) -> None:
    make_folder(tmp_path / "images")
    everything = folder(tmp_path / "images").load("train")
    (tmp_path / "names.txt").write_text("class2 a cat\nclass0\ta dog\n\n")
    for classes in (["class2", "class0"], str(tmp_path / "names.txt")):
        split = folder(tmp_path / "images", classes=classes).load("train")
        assert split.labels["class"].tolist() == [0] * 8 + [1] * 8
        assert torch.equal(split.images, everything.images[everything.labels["class"] != 1])
    with pytest.raises(UserError, match="no class folder lion"):
        folder(tmp_path / "images", classes=["class0", "lion"]).load("train")
    with pytest.raises(UserError, match=r"nowhere.txt is no file"):
        folder(tmp_path / "images", classes=str(tmp_path / "nowhere.txt")).load("train")
    with pytest.raises(UserError, match="no class folder lion and tiger"):
        folder(tmp_path / "images", classes=["lion and tiger"]).load("train")
    (tmp_path / "names.txt").write_text("class2\r\n", encoding="utf-8-sig")
    assert folder(tmp_path / "images", classes=str(tmp_path / "names.txt")).class_names("class") == ["class2"]
    (tmp_path / "names.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(UserError, match=r"names.txt cannot be read .*; save it as plain text in UTF-8"):
        folder(tmp_path / "images", classes=str(tmp_path / "names.txt")).load("train")


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "class0" / "0.jpg").rename(root / "class0" / "00.jpg"),
        lambda root: (root / "class0" / "0.jpg").rename(root / "class1" / "0.jpg~moved.jpg"),
        lambda root: (root / "class0" / "0.jpg").unlink(),
        lambda root: (root / "class1").rename(root / "other"),
    ],
)
def test_the_fingerprint_changes_with_names_and_labels_and_not_with_the_place(tmp_path: Path, change) -> None:
    root = make_folder(tmp_path / "images", images=3)
    before = folder(root).fingerprint("train")
    root = root.rename(tmp_path / "moved")
    assert folder(root).fingerprint("train") == before
    change(root)
    assert folder(root).fingerprint("train") != before


def test_a_text_file_of_class_names_is_an_option_of_the_command_line(tmp_path: Path) -> None:
    """Names may contain blanks."""
    root = make_folder(tmp_path / "images")
    (root / "class1").rename(root / "golden retriever")
    (root / "class2").rename(root / "golden")
    names = tmp_path / "names.txt"
    names.write_text("golden retriever\nclass0 a cat\n")
    config = resolve(compose("dataset=image_folder", f"dataset.root={root}", f"dataset.classes={names}"))
    check(config)
    data = build(config["dataset"])
    assert data.class_names("class") == ["class0", "golden retriever"]
    assert data.load("train").labels["class"].tolist() == [0] * 8 + [1] * 8


def test_imagenet_layout_and_number_of_classes(tmp_path: Path) -> None:
    for split, images in (("train", 4), ("val", 2), ("test", 1)):
        make_folder(tmp_path / split, images=images, kind="JPEG")

    def imagenet(count: int, classes: list[str] | None = None) -> ImageNet:
        limits = {"max_corrupt": 0.0, "memory_limit_gb": 1.0, "workers": 0}
        return ImageNet(class_count=count, root=str(tmp_path), classes=classes, **limits, **COMMON)

    assert (len(imagenet(3).load("train")), len(imagenet(3).load("test"))) == (12, 6)
    assert len(imagenet(2, ["class0", "class2"]).load("train")) == 8
    with pytest.raises(UserError, match=r"train images of 3 classes, expected 100.*dataset.classes"):
        imagenet(100).train_and_validation()


def mixture(*roots: Path, weights: list[float] | None = None, **options: object) -> FolderMixture:
    """Return a small dataset of several folders."""
    limits = {"max_corrupt": 0.0, "memory_limit_gb": 1.0, "workers": 0}
    return FolderMixture([str(root) for root in roots], weights, **(limits | COMMON | options))


def test_mixture_keeps_equal_class_names_apart(tmp_path: Path) -> None:
    a, b = make_folder(tmp_path / "a", images=4), make_folder(tmp_path / "b", classes=2, images=8)
    split = mixture(a, b).load("train")
    assert torch.bincount(split.labels["class"]).tolist() == [4, 4, 4, 8, 8]
    assert torch.equal(split.images, torch.cat([folder(a).load("train").images, folder(b).load("train").images]))
    train, held = mixture(a, b).train_and_validation()
    assert torch.bincount(held.labels["class"]).tolist() == [1, 1, 1, 2, 2]
    assert len(train) == 21


@pytest.mark.parametrize(("weights", "counts"), [([3.0, 1.0], [36, 12]), ([1.0, 1.0], [12, 12]), ([1.0, 5.0], [9, 45])])
def test_a_mixture_reaches_its_shares_and_keeps_every_image(tmp_path: Path, weights: list[float], counts: list[int]) -> None:
    a, b = make_folder(tmp_path / "a", images=4), make_folder(tmp_path / "b", classes=2, images=8)
    once, held = mixture(a, b).train_and_validation()
    train, same = mixture(a, b, weights=weights).train_and_validation()
    assert torch.equal(held.images, same.images)
    assert torch.equal(train.images, once.images), "probes are fitted to every image once"
    labels = train.labels["class"][train.epoch]
    assert [(labels < 3).sum(), (labels >= 3).sum()] == counts
    assert set(map(pixels, train.epoch_images)) == set(map(pixels, once.images))
    streamed, _ = mixture(a, b, weights=weights, memory_limit_gb=0.0).train_and_validation()
    assert torch.equal(streamed.epoch_images[:], train.epoch_images)


def test_mixture_of_labeled_and_unlabeled_folders(tmp_path: Path) -> None:
    a = make_folder(tmp_path / "a", images=4)
    b = make_folder(tmp_path / "b", classes=1) / "class0"
    split = mixture(b, a).load("train")
    assert split.labels["class"].tolist() == [-1] * 8 + [0] * 4 + [1] * 4 + [2] * 4
    assert mixture(b, b).load("train").labels == {}
    assert len(mixture(b, b).train_and_validation()[1]) == 4


def test_labels_of_a_mixture_count_class_folders_without_images(tmp_path: Path) -> None:
    a, b = make_folder(tmp_path / "a" / "train", images=4), make_folder(tmp_path / "b" / "train", images=4)
    for root in (a.parent, b.parent):
        shutil.copytree(root / "train", root / "test")
    for image in (a.parent / "test" / "class2").iterdir():
        image.unlink()
    test = mixture(a.parent, b.parent).load("test").labels["class"]
    assert torch.bincount(test).tolist() == [4, 4, 0, 4, 4, 4]


def test_a_folder_of_a_mixture_with_no_image_left_is_named(tmp_path: Path) -> None:
    a, b = make_folder(tmp_path / "a", images=40), make_folder(tmp_path / "b", classes=1, images=1)
    with pytest.raises(UserError, match=r"dataset.weights: no image of .*/b is left .*dataset.max_images=20"):
        mixture(a, b, a, weights=[1.0, 1.0, 1.0], max_images=20).train_and_validation()


def test_indices_are_evenly_spaced_beyond_the_precision_of_float32() -> None:
    indices = evenly_spaced_indices(2**26, 2**10)
    assert (indices[0], indices[-1]) == (0, 2**26 - 1)
    assert indices.diff().min() + 1 >= indices.diff().max()


def test_bad_mixtures_are_refused(tmp_path: Path) -> None:
    a = make_folder(tmp_path / "a")
    with pytest.raises(UserError, match="at least one folder"):
        mixture()
    with pytest.raises(UserError, match="2 positive numbers"):
        mixture(a, a, weights=[1.0])


def test_the_validation_part_is_stratified_fixed_and_disjoint(tmp_path: Path) -> None:
    data = folder(make_folder(tmp_path))
    train, held = data.train_and_validation()
    assert torch.bincount(held.labels["class"]).tolist() == [2, 2, 2]
    assert len(train) == 18
    again, _ = data.train_and_validation()
    assert torch.equal(train.images, again.images)
    assert not set(map(pixels, train.images)) & set(map(pixels, held.images))


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_dataset_of_equal_images_is_refused(tmp_path: Path, limit: float, caplog) -> None:
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        for i in range(8):
            Image.new("RGB", (16, 16), (7, 7, 7)).save(tmp_path / c / f"{i}.png")
    data = folder(tmp_path, memory_limit_gb=limit)
    with pytest.raises(UserError, match=r"All 16 images that were compared have the same pixels"):
        check_images_differ(*data.train_and_validation())
    train, _ = data.split_indices(torch.tensor([0] * 8 + [1] * 8))
    chosen = sorted(tmp_path.rglob("*.png"))[int(train[0])]
    Image.new("RGB", (16, 16), (8, 7, 7)).save(chosen)
    check_images_differ(*data.train_and_validation())
    assert "All 4 validation images that were compared have the same pixels" in caplog.text
    caplog.clear()
    check_images_differ(*folder(make_folder(tmp_path / "other"), memory_limit_gb=limit).train_and_validation())
    assert caplog.text == ""


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_max_images_uses_a_fixed_part_of_every_class(tmp_path: Path, limit: float) -> None:
    make_folder(tmp_path, images=16)
    every, part = (folder(tmp_path, memory_limit_gb=limit, max_images=count) for count in (None, 24))
    train, held = part.train_and_validation()
    assert torch.bincount(train.labels["class"]).tolist() == [6, 6, 6]
    assert torch.bincount(held.labels["class"]).tolist() == [2, 2, 2]
    all_pixels = {pixels(image) for image in every.load("train").images[:]}
    used = [pixels(image) for split in (train, held) for image in split.images[:]]
    assert len(set(used)) == 24
    assert set(used) <= all_pixels
    again, _ = part.train_and_validation()
    assert torch.equal(again.images[:], train.images[:])
    more, _ = folder(tmp_path, memory_limit_gb=limit, max_images=1000).train_and_validation()
    assert torch.equal(more.images[:], every.train_and_validation()[0].images[:])
    shapes, validation = Shapes(train=50, test=50, data_seed=0, max_images=20, **COMMON).train_and_validation()
    assert len(shapes) + len(validation) == 20


def test_unknown_labels_are_never_held_out() -> None:
    labels = torch.tensor([-1] * 50 + [0] * 10 + [1] * 10)
    held = stratified_indices(labels, 0.2)
    assert torch.bincount(labels[held]).tolist() == [2, 2]


class MeanColor:
    """A network without weights, whose features are the mean color of an image."""

    training, device = False, torch.device("cpu")

    def train(self, mode: bool = True) -> None: ...

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_classes_without_a_validation_image_are_counted_and_the_others_scored(tmp_path: Path, limit: float, caplog) -> None:
    make_folder(tmp_path, classes=2, images=20)
    for name, count in (("few", 4), ("fewer", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (0, 0, 9 * i)).save(tmp_path / name / f"{i}.png")
    data = folder(tmp_path, memory_limit_gb=limit, validation=0.1)
    train, held = data.train_and_validation()
    assert torch.bincount(held.labels["class"], minlength=4).tolist() == [2, 2, 0, 0]
    assert torch.bincount(train.labels["class"]).tolist() == [18, 18, 4, 1]
    assert caplog.text.count("so few images") == 1
    assert "2 of 4 classes have so few images that none is held out for validation, for example few with 4" in caplog.text
    probe = Probe(1, train_images=50, validation_images=50, neighbors=3, temperature=0.1, penalties=[1e-3], batch_size=8)
    assert probe(MeanColor(), *probe.select_images(train, held), data.normalize)["linear"] == 1.0


def test_nothing_is_said_of_classes_that_are_all_scored_or_of_images_without_classes(tmp_path: Path, caplog) -> None:
    folder(make_folder(tmp_path)).train_and_validation()
    folder(tmp_path / "class0").train_and_validation()
    Shapes(train=60, test=10, data_seed=0, **COMMON).train_and_validation()
    assert "so few images" not in caplog.text


def spoil(none: Path, half: Path) -> None:
    """Make two files unreadable: one is no image, the other one is cut off."""
    none.write_bytes(b"no image")
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])


def test_corrupt_images_are_named_and_replaced_or_refused(tmp_path: Path, caplog) -> None:
    sound = folder(make_folder(tmp_path)).load("train")
    spoil(tmp_path / "class1" / "3.jpg", tmp_path / "class2" / "7.jpg")
    with pytest.raises(UserError, match=r"2 of 24 images cannot be read.*class1/3.jpg.*class2/7.jpg"):
        folder(tmp_path).load("train")
    split = folder(tmp_path, max_corrupt=0.1).load("train")
    expected = sound.images.clone()
    expected[[11, 23]] = sound.images[[12, 16]]  # the next image of the class, cyclically
    assert torch.equal(split.images, expected)
    assert torch.equal(split.labels["class"], sound.labels["class"])
    assert "class1/3.jpg" in caplog.text


def test_a_class_without_a_readable_image_borrows_one(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=2, images=2)
    for file in (tmp_path / "class0").iterdir():
        file.write_bytes(b"")
    images = folder(tmp_path, max_corrupt=0.5).load("train").images
    assert torch.equal(images[:2], images[[2, 2]])
    for file in (tmp_path / "class1").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="4 of 4 images cannot be read"):
        folder(tmp_path, max_corrupt=1.0).load("train")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        folder(tmp_path / "nowhere").load("train")
    with pytest.raises(UserError, match="neither images nor class folders"):
        folder(tmp_path).load("train")
    Image.new("RGB", (16, 16)).save(tmp_path / "loose.png")
    assert folder(tmp_path).load("train").labels == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="hold no images"):
        folder(tmp_path).load("train")
    make_folder(tmp_path)
    with pytest.raises(UserError, match="no test/ or val/ folder"):
        folder(tmp_path).load("test")


@pytest.mark.parametrize(
    ("target", "option", "value"),
    [
        ("Shapes", "image_size", 0),
        ("Shapes", "validation", 1.0),
        ("Shapes", "views", 0),
        ("Shapes", "local_views", -1),
        ("Shapes", "local_size", 0),
        ("Shapes", "local_scale", [0.3]),
        ("ImageFolder", "memory_limit_gb", -1.0),
        ("ImageFolder", "workers", -1),
        ("ImageFolder", "max_corrupt", 2.0),
        ("ImageFolder", "classes", [1]),
        ("ImageNet", "class_count", 0),
        ("FolderMixture", "weights", [1.0, 0.0]),
    ],
)
def test_options_out_of_bounds_are_refused(target: str, option: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.{option}="):
        check_node("dataset", {"_target_": f"hjepa.data.{target}", option: value})


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a folder on a local port; yield the folder and the address."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def serve_archive(
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    served: tuple[Path, str],
    files: dict[str, bytes],
    lists: dict[str, object],
) -> None:
    """Let a torchvision dataset download a small archive that holds the files, with its checksum."""
    folder, address = served
    with tarfile.open(folder / "archive.tar.gz", "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    digest = hashlib.md5((folder / "archive.tar.gz").read_bytes()).hexdigest()
    archive = {"url": f"{address}/archive.tar.gz", "filename": "archive.tar.gz", "tgz_md5": digest}
    for name, value in (archive | lists).items():
        monkeypatch.setattr(kind, name, value)


@pytest.mark.parametrize(("name", "key", "classes"), [("CIFAR10", "labels", 10), ("CIFAR100", "fine_labels", 100)])
def test_cifar_is_downloaded_checked_and_read(tmp_path: Path, served, monkeypatch, name: str, key: str, classes: int) -> None:
    kind, rng = getattr(datasets, name), np.random.default_rng(0)
    base, names = kind.base_folder, [f"label{i}" for i in range(classes)]
    files, entries = {}, {}
    for split in ("train", "test"):
        data = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), key: list(range(10)) * 2}
        files[f"{base}/{split}"] = pickle.dumps(data)
        entries[split] = data
    meta_key = kind.meta["key"]
    files[f"{base}/meta"] = pickle.dumps({meta_key: names})
    digest = {k.split("/")[-1]: hashlib.md5(v).hexdigest() for k, v in files.items()}
    lists = {
        "train_list": [["train", digest["train"]]],
        "test_list": [["test", digest["test"]]],
        "meta": {"filename": "meta", "key": meta_key, "md5": digest["meta"]},
    }
    serve_archive(monkeypatch, kind, served, files, lists)
    data = TorchvisionDataset(name, str(tmp_path / "root"), **(COMMON | {"image_size": 32}))
    split = data.load("train")
    assert torch.equal(split.images.flatten(1), torch.from_numpy(entries["train"]["data"]))
    assert split.labels["class"].tolist() == list(range(10)) * 2
    assert len(data.load("test")) == 20


def test_stl10_trains_on_unlabeled_images_too(tmp_path: Path, served, monkeypatch) -> None:
    kind, rng = datasets.STL10, np.random.default_rng(0)
    base, files = kind.base_folder, {}
    for split, count in (("train", 40), ("test", 10), ("unlabeled", 30)):
        files[f"{base}/{split}_X.bin"] = rng.integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8).tobytes()
        if split != "unlabeled":
            files[f"{base}/{split}_y.bin"] = (np.arange(count, dtype=np.uint8) % 10 + 1).tobytes()
    files[f"{base}/class_names.txt"] = b"\n".join(b"c%d" % i for i in range(10))
    digest = {k.split("/")[-1]: hashlib.md5(v).hexdigest() for k, v in files.items()}
    lists = {
        "train_list": [[f, digest[f]] for f in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")],
        "test_list": [[f, digest[f]] for f in ("test_X.bin", "test_y.bin")],
    }
    serve_archive(monkeypatch, kind, served, files, lists)
    data = TorchvisionDataset("STL10", str(tmp_path / "root"), **(COMMON | {"image_size": 48}))
    train, held = data.train_and_validation()
    assert len(train) + len(held) == 70
    assert train.images.shape[1:] == (3, 48, 48)
    assert (held.labels["class"] >= 0).all()
    assert (train.labels["class"] == -1).sum() == 30


def test_a_download_goes_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TorchvisionDataset("CIFAR10", "~/data", **COMMON).root == str(tmp_path / "data")


def test_a_failed_download_is_explained_in_one_sentence(tmp_path: Path, served, monkeypatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{served[1]}/missing.tar.gz")
    with pytest.raises(UserError, match=r"CIFAR10 could not be downloaded"):
        TorchvisionDataset("CIFAR10", str(tmp_path / "root"), **COMMON).load("train")


def test_shapes_splits_differ() -> None:
    data = Shapes(train=50, test=50, data_seed=0, **COMMON)
    assert not torch.equal(data.load("train").images, data.load("test").images)
    assert not torch.equal(data.load("train").images, Shapes(train=50, test=50, data_seed=1, **COMMON).load("train").images)


def test_normalization_uses_mean_and_std() -> None:
    data = Shapes(train=50, test=50, data_seed=0, **COMMON)
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert torch.allclose(data.normalize(images)[0, :, 0, 0], (torch.tensor([0, 128, 255]) / 255 - 0.5) / 0.25, atol=1e-5)
