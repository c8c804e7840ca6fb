"""Pixels of image files of every mode: scaled by a fixed rule, composited, or refused by name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.config.upgrade import upgrade_config
from hjepa.data.image_files import read_image
from hjepa.data.pixels import COLOR_MODES, shorten, to_rgb
from tests.unit.test_data import folder

RAMP = np.tile(np.linspace(0, 65535, 16).round().astype(np.uint16), (16, 1))  # gray values 0, 4369, 8738 ..., 17 * 257 apart
EIGHT_BITS = (RAMP // 257).astype(np.uint8)


def read(file: Path, **options: object) -> np.ndarray:
    """Return the pixels [16, 16, 3] of a readable file."""
    image = read_image(str(file), 16, **options)
    assert isinstance(image, np.ndarray), image
    return image


def write_tiff(file: Path, bits: int, photometric: int, data: bytes) -> None:
    """Write a grayscale TIFF of 16x16 pixels with unsigned integers."""
    entries = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 16), (279, len(data))]
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    file.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + bytes(4) + data)


def write_png(file: Path, bits: int, color: int, row: bytes, transparent: bytes) -> None:
    """Write a PNG of 16x16 pixels with equal rows and a transparent color."""
    header = struct.pack(">IIBBBBB", 16, 16, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress((b"\0" + row) * 16)), (b"IEND", b"")]
    text = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + text)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_the_full_range_of_16_bits_becomes_that_of_8(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    Image.fromarray(RAMP).save(file)
    assert (read(file) == EIGHT_BITS[..., None]).all()
    Image.fromarray(RAMP + np.uint16(128) * (RAMP < 60000)).save(file)
    assert (read(file) == EIGHT_BITS[..., None]).all(), "values are rounded"


def test_color_images_of_16_bits_agree_with_gray_ones(tmp_path: Path) -> None:
    row = b"".join(struct.pack(">3H", value, value, value) for value in RAMP[0].tolist())
    write_png(tmp_path / "a.png", 16, 2, row, b"")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data.replace(struct.pack(">I", 0) + b"tRNS" + struct.pack(">I", zlib.crc32(b"tRNS")), b""))
    assert (read(tmp_path / "a.png") == EIGHT_BITS[..., None]).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bits_in_memory_in_any_byte_order(mode: str) -> None:
    data = RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    assert (np.array(to_rgb(Image.frombytes(mode, (16, 16), data))) == EIGHT_BITS[..., None]).all()


def test_12_bits_and_white_as_zero_are_read_from_the_header(tmp_path: Path) -> None:
    values = (RAMP[0] >> 4).tolist()
    packed = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    write_tiff(tmp_path / "12.tif", 12, 1, packed * 16)
    assert (read(tmp_path / "12.tif") == EIGHT_BITS[..., None]).all()
    for photometric, expected in ((1, EIGHT_BITS), (0, 255 - EIGHT_BITS)):
        write_tiff(tmp_path / "16.tif", 16, photometric, RAMP.astype("<u2").tobytes())
        assert (read(tmp_path / "16.tif") == expected[..., None]).all()


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("32.tif", RAMP.astype(np.int32)),
        ("float.tif", (RAMP / 65535).astype(np.float32)),
        ("float.pfm", RAMP.astype(np.float32)),
    ],
)
def test_modes_without_a_fixed_range_are_refused_by_name(tmp_path: Path, name: str, pixels: np.ndarray, caplog) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / name
    Image.fromarray(pixels).save(file)
    assert "no fixed range of values; scale it to 8 or 16 bits and save it as PNG" in str(read_image(str(file), 16))
    file = file.rename(file.with_name("0.tif"))  # whatever the name says
    for i in (1, 2):
        Image.fromarray(EIGHT_BITS).save(tmp_path / "a" / f"{i}.png")
    with pytest.raises(UserError, match=r"a/0.tif \(mode .* has no fixed range"):
        folder(tmp_path).load("train")
    images = folder(tmp_path, max_corrupt=0.5).load("train").images
    assert (images == torch.from_numpy(EIGHT_BITS)).all(), "another image takes its place"
    assert "a/0.tif (mode" in caplog.text


@pytest.mark.parametrize("mode", COLOR_MODES)
def test_every_color_mode_keeps_its_colors(mode: str) -> None:
    """Black, white and, in color, red come back as they were."""
    colors = [(0, 0, 0), (255, 255, 255)] + ([] if mode in ("1", "L", "LA", "La") else [(254, 0, 0)])
    for color in colors:
        image = Image.new("RGB", (4, 4), color)
        if mode == "LAB":
            image = lab(image)
        else:
            for step in {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("RGBA", "PA")}.get(mode, (mode,)):
                image = image.convert(step)
        assert image.mode == mode
        difference = np.array(to_rgb(image)).astype(int) - color
        assert np.abs(difference).max() <= (6 if mode == "LAB" else 2), color


def lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def test_every_mode_of_pillow_has_a_rule() -> None:
    """New modes of Pillow are refused by name until they have one."""
    integers = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
    assert set(getattr(Image, "MODES", [])) <= {*COLOR_MODES, *integers, "F"}
    image = Image.new("RGB", (4, 4))
    image._mode = "XYZ"
    with pytest.raises(UserError, match="mode XYZ"):
        to_rgb(image)


# -- Transparency ----------------------------------------------------------------------------------------------------------


def transparent(color: int, mode: str = "RGBA") -> Image.Image:
    """Return an image whose left half is green or gray, and whose right half is transparent, with a color under it."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (0, 200, 0, 255) if mode.startswith(("R", "P")) else (90, 90, 90, 255)
    pixels[:, 8:] = (color, color, color, 0)
    image = Image.fromarray(pixels)
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "PA.tif", "RGBA.webp", "RGBA.tif", "P.png"])
def test_images_that_look_the_same_are_the_same(tmp_path: Path, kind: str) -> None:
    mode, files = kind.partition(".")[0], []
    for i, color in enumerate((10, 240)):
        image = transparent(color, mode) if mode != "P" else transparent(color).quantize(4)
        files.append(tmp_path / f"{i}.{kind}")
        image.save(files[-1], **({"lossless": True, "exact": True} if "webp" in kind else {}))
    for background in ((255, 255, 255), (0, 0, 255)):
        first, second = (read(file, background=background) for file in files)
        assert np.array_equal(first, second)
        assert (first[:, 8:] == background).all()
        assert (first[:, :8] == ((0, 200, 0) if "P" in mode or mode == "RGBA" else (90, 90, 90))).all()
    if mode == "RGBA" or mode == "LA":
        ignored = [read(file, background=None) for file in files]
        assert [image[0, 8].tolist() for image in ignored] == [[10] * 3, [240] * 3], "as in version 0.1"


def test_partly_transparent_pixels_are_mixed_with_the_background() -> None:
    image = Image.new("RGBA", (2, 2), (200, 100, 0, 51))  # a fifth
    assert to_rgb(image, (0, 0, 0)).getpixel((0, 0)) == (40, 20, 0)
    assert to_rgb(image.convert("RGBa"), (0, 0, 0)).getpixel((0, 0)) == pytest.approx((40, 20, 0), abs=2)
    gray = Image.new("LA", (2, 2), (200, 51)).convert("La")
    assert to_rgb(gray, (0, 0, 0)).getpixel((0, 0)) == pytest.approx((40, 40, 40), abs=2)


@pytest.mark.parametrize(
    ("bits", "color", "row", "transparent_color"),
    [
        (1, 0, b"\x0f\x0f", (1,)),
        (2, 0, b"\x1b" * 4, (1,)),
        (4, 0, b"\x01\x23\x45\x67\x89\xab\xcd\xef", (5,)),
        (8, 0, bytes(range(16)), (7,)),
        (16, 0, RAMP[:1].astype(">u2").tobytes(), (4369,)),
        (8, 2, bytes(range(48)), (3, 4, 5)),
    ],
)
def test_the_transparent_color_of_a_png_is_replaced_by_the_background(
    tmp_path: Path, bits: int, color: int, row: bytes, transparent_color: tuple[int, ...]
) -> None:
    write_png(tmp_path / "a.png", bits, color, row, struct.pack(f">{len(transparent_color)}H", *transparent_color))
    image, opaque = read(tmp_path / "a.png", background=(1, 2, 3)), read(tmp_path / "a.png", background=None)
    replaced = (image == (1, 2, 3)).all(2)
    expected = (opaque == np.multiply(transparent_color, 255 / (2**bits - 1)).round()).all(2)
    assert expected.any()
    assert not expected.all()
    assert np.array_equal(replaced, expected)
    assert np.array_equal(image[~replaced], opaque[~replaced])


def test_a_transparent_color_that_pillow_confuses_is_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", 16, 2, RAMP[0].astype(">u2").repeat(3).tobytes(), struct.pack(">3H", 4369, 4369, 4369))
    assert "a transparent color of 16 bits" in str(read_image(str(tmp_path / "a.png"), 16))


def test_the_background_is_an_option_of_all_datasets_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(2):
        transparent(100 * i).save(tmp_path / "a" / f"{i}.png")
    data = folder(tmp_path, background=[0, 0, 255])
    assert (data.load("train").images[:, :, :, 8:] == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()
    assert (folder(tmp_path).load("train").images[:, :, :, 8:] == 255).all()
    selected = folder(tmp_path, memory_limit_gb=0.0, background=[0, 0, 255]).train_and_validation
    with pytest.raises(UserError, match="leaves no image"):
        selected()
    assert (data.sample(1)[:, :, :, 8:] == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()


@pytest.mark.parametrize("value", [[255, 255], [0, 0, 256], [-1, 0, 0], "white", [0.5, 0.5, 0.5]])
def test_a_background_that_is_no_color_is_refused(value: object) -> None:
    for target in ("ImageFolder", "ImageNet", "FolderMixture"):
        with pytest.raises(UserError, match=r"^dataset\.background="):
            check_node("dataset", {"_target_": f"hjepa.data.{target}", "background": value})


def test_runs_of_earlier_versions_ignore_transparency_as_they_did() -> None:
    for target in ("ImageFolder", "ImageNet", "FolderMixture"):
        old = {"dataset": {"_target_": f"hjepa.data.{target}", "max_corrupt": 0.01}}
        assert upgrade_config(old)["dataset"]["background"] is None
    assert "background" not in upgrade_config({"dataset": {"_target_": "hjepa.data.Shapes"}})["dataset"]


def test_a_line_of_pixels_is_cropped_before_it_grows(tmp_path: Path) -> None:
    """Resized as a whole, these files of some hundred bytes would take several gigabytes."""
    for name, size in (("wide", (60000, 2)), ("high", (1, 20000))):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / f"{name}.png")
        image = read_image(str(tmp_path / f"{name}.png"), 224)
        assert image.shape == (224, 224, 3)
        assert (image == (10, 20, 30)).all()
    assert shorten(Image.new("RGB", (4001, 10))).size == (81, 10)
    image = Image.new("RGB", (80, 10))
    assert shorten(image) is image
