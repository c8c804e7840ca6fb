"""What is data below a folder, and what is not, for everything that lists images."""

import os
from pathlib import Path

import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from hjepa.config.errors import UserError
from hjepa.data.file_lists import class_folders, list_images, walk_images
from hjepa.tasks.export.features import find_images
from tests.unit.test_data import folder, make_folder, mixture

NO_DATA = (
    ".ipynb_checkpoints/0-checkpoint.jpg",
    ".hidden.jpg",
    "._0.jpg",
    "__MACOSX/class0/0.jpg",
    "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
    "lost+found/0.jpg",
    "$RECYCLE.BIN/0.jpg",
    "System Volume Information/0.jpg",
    "Thumbs.db",
    ".DS_Store",
)


def copy(image: Path, files: tuple[str, ...], target: Path) -> None:
    """Copy an image to several paths below a folder."""
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(image.read_bytes())


def make_run(run: Path, image: Path) -> None:
    """Write what a run leaves behind."""
    copy(image, ("plots/views.png", "visualize/pca.png"), run)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).touch()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of three classes with eight images each, one image in a subfolder of its class."""
    root = make_folder(tmp_path / "images")
    (root / "class1" / "deep.er").mkdir()
    (root / "class1" / "7.jpg").rename(root / "class1" / "deep.er" / "7.JPG")
    return root


def test_folders_that_look_like_splits_are_no_classes(root: Path) -> None:
    for name, split in (("class0", "Train"), ("class1", "TEST"), ("class2", "Val")):
        (root / name).rename(root / split)
    with pytest.raises(UserError, match=r"the folders TEST, Train, Val in .* look like splits, not like classes; rename them"):
        folder(root).find_images("train")
    assert len(folder(root, classes=["TEST", "Train", "Val"]).find_images("train")[0]) == 24


def test_images_beside_class_folders_are_counted_and_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy(root / "class0" / "0.jpg", ("a.jpg", "b.jpg"), root)
    assert len(folder(root).find_images("train")[0]) == 24
    assert f"2 images directly in {root}, beside the class folders, are left out." in caplog.text


def relative(paths: list[str], root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in paths]


def test_the_order_is_that_of_torchvision(root: Path) -> None:
    """Splits are chosen by position, so those of earlier runs stay."""
    (root / "class1" / "deep").mkdir()
    (root / "class1" / "deep" / "9.png").touch()
    expected = make_dataset(str(root), {f"class{i}": i for i in range(3)}, IMG_EXTENSIONS)
    assert list(zip(*list_images(root), strict=True)) == expected
    assert walk_images(root) == [path for path, _ in expected]


@pytest.mark.parametrize("place", ["", "class0", "class1/deep.er"])
def test_what_is_no_data_is_left_out_everywhere(root: Path, tmp_path: Path, place: str) -> None:
    before, walked, files = list_images(root), walk_images(root), find_images(root, tmp_path / "f.parquet")
    copy(root / "class0" / "0.jpg", NO_DATA, root / place)
    make_run(root / place / "outputs" / "default" / "shapes-s0", root / "class0" / "0.jpg")
    copy(root / "class0" / "0.jpg", ("sweeps/1/sweep.png",), root / place / "outputs")
    os.mkfifo(root / place / "pipe.jpg")
    assert list_images(root) == before
    assert walk_images(root) == walked
    assert find_images(root, tmp_path / "f.parquet") == files
    assert class_folders(root, None) == folder(root).class_names("class") == ["class0", "class1", "class2"]
    assert mixture(root, root).load("train").labels["class"].tolist() == [c for c in range(6) for _ in range(8)]


def test_both_splits_leave_out_what_is_no_data(tmp_path: Path) -> None:
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", images=2)
    copy(tmp_path / "train" / "class0" / "0.jpg", NO_DATA, tmp_path / "train")
    data = folder(tmp_path)
    assert len(data.load("train")) == 24
    assert len(data.load("test")) == 6, "the splits have the same classes"


@pytest.mark.parametrize("depth", ["", "default", "default/r"])
def test_images_beside_a_folder_of_runs_are_without_classes(tmp_path: Path, depth: str) -> None:
    images = make_folder(tmp_path, classes=1) / "class0"
    make_run(images / "runs" / depth, images / "0.jpg")
    paths, labels = list_images(images)
    assert (len(paths), set(labels)) == (8, {-1})


def test_a_folder_of_images_is_data_even_if_runs_were_written_to_it(root: Path) -> None:
    before = list_images(root)
    make_run(root / "class0" / "default" / "r", root / "class0" / "0.jpg")
    assert list_images(root) == before


def test_links_in_a_circle_are_not_followed_and_others_are(root: Path, tmp_path: Path) -> None:
    before = list_images(root)
    (root / "class0" / "up").symlink_to(root)
    (root / "class0" / "self").symlink_to(root / "class0")
    (root / "class1" / "deep.er" / "far up").symlink_to(tmp_path)
    (root / "all").symlink_to(root)
    (root / "nowhere").symlink_to(root / "nowhere")
    assert list_images(root) == before
    elsewhere = make_folder(tmp_path / "elsewhere", classes=2, images=3)
    (root / "class2" / "linked").symlink_to(elsewhere / "class0")
    (root / "class3").symlink_to(elsewhere / "class1")
    (elsewhere / "class0" / "back").symlink_to(root / "class2")
    (elsewhere / "class1" / "other").symlink_to(elsewhere / "class0")
    paths, labels = list_images(root)
    assert [labels.count(c) for c in range(4)] == [8, 8, 11, 3 + 3 + 8]
    assert "class2/linked/0.jpg" in relative(paths, root)


def test_the_folder_itself_may_have_any_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / ".cache" / "lost+found")
    assert len(list_images(root)[0]) == len(walk_images(root)) == 24


def test_a_folder_that_cannot_be_listed_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Path) -> object:
        if str(path).endswith("class1"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"class1 cannot be listed \(Permission denied\)"):
        walk_images(root)
