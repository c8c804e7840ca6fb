"""Images are what a viewer shows: upright by their metadata, squares, and as large as is allowed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hjepa.config.errors import UserError
from hjepa.config.schema import check, check_node, resolve
from hjepa.data.image_files import CorruptFiles, ImageFiles, read_image
from hjepa.data.pixels import to_rgb
from hjepa.data.sources import FilePaths
from tests.helpers.runs import compose
from tests.unit.test_data import folder, make_folder

ORIENTATION = 0x0112  # tag of EXIF

CORNERS = np.zeros((16, 16, 3), np.uint8)  # a different color in every quarter
CORNERS[:8, :8], CORNERS[:8, 8:], CORNERS[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(file: Path, orientation: int, mode: str = "RGB") -> Path:
    """Write an image that was taken with a camera held in some orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(CORNERS).convert(mode).save(file, exif=exif, **({"quality": 95} if file.suffix != ".tif" else {}))
    return file


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    file = save(tmp_path / f"a.{kind}", orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    assert (read_image(str(file), 16) == expected).all()
    assert (np.asarray(to_rgb(Image.open(file))) == expected).all(), "the transform of hjepa.load, which takes open images"


@pytest.mark.parametrize(("mode", "kind"), [("L", "jpg"), ("I;16", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png")])
def test_images_of_all_modes_are_turned_upright(tmp_path: Path, mode: str, kind: str) -> None:
    upright, turned = (read_image(str(save(tmp_path / f"{n}.{kind}", n, mode)), 16) for n in (1, 6))
    assert isinstance(upright, np.ndarray)
    assert isinstance(turned, np.ndarray)
    assert (turned == np.rot90(upright, -1)).all()
    assert len(np.unique(upright)) > 1


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"nothing"])
def test_broken_metadata_leave_an_image_as_it_is(tmp_path: Path, exif: bytes) -> None:
    Image.fromarray(CORNERS).save(tmp_path / "a.png")
    Image.fromarray(CORNERS).save(tmp_path / "b.png", exif=exif)
    assert (read_image(str(tmp_path / "b.png"), 16) == read_image(str(tmp_path / "a.png"), 16)).all()


def test_photos_that_differ_in_orientation_alone_are_the_same_image(tmp_path: Path) -> None:
    for orientation, method in ((1, None), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        image = Image.fromarray(CORNERS)
        (image.transpose(method) if method is not None else image).save(tmp_path / f"{orientation}.png", exif=exif)
    images = folder(tmp_path).load("train").images
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_very_large_images_are_allowed_by_an_option_that_the_message_names(tmp_path: Path, limit: float) -> None:
    make_folder(tmp_path, images=2)
    Image.new("RGB", (200, 300), (9, 9, 9)).save(tmp_path / "class0" / "scan.png")
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(
        UserError, match=r"scan.png \(Image size \(60000 pixels\) exceeds limit of 50000 pixels; raise dataset.max_m"
    ):
        folder(tmp_path, max_megapixels=0.05, memory_limit_gb=limit).load("train").images[:]
    assert len(folder(tmp_path, max_megapixels=0.06, memory_limit_gb=limit).load("train").images[:]) == 7
    paths = np.array([bytes(tmp_path / "class0" / "scan.png")])
    files = ImageFiles(FilePaths(paths), torch.zeros(1), 16, CorruptFiles(1, 0.0, "task"), 0, max_megapixels=0.05)
    with pytest.raises(UserError, match=r"raise task.max_megapixels"):
        files[:]
    assert before == Image.MAX_IMAGE_PIXELS, "a setting of the whole process"


def test_the_python_api_obeys_the_limit_of_pillow(tmp_path: Path, monkeypatch) -> None:
    Image.new("RGB", (200, 300)).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25_000)
    assert str(read_image(str(tmp_path / "scan.png"), 16)).endswith("; raise PIL.Image.MAX_IMAGE_PIXELS")


@pytest.mark.parametrize("value", ["[64,128]", "64x128"])
def test_a_rectangle_is_refused_by_the_option_that_was_typed(value: str) -> None:
    with pytest.raises(
        UserError, match=r"^dataset.image_size=.*64.*: .* center-cropped to a square: give its side as one number"
    ):
        check(resolve(compose(f"dataset.image_size={value}")))


def test_the_side_of_an_image_is_positive() -> None:
    with pytest.raises(UserError, match=r"^dataset.image_size=0: "):
        check_node("dataset", {"_target_": "hjepa.data.Shapes", "image_size": 0})
