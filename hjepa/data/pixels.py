"""Pixels of all kinds of image files as 8-bit RGB, as a viewer shows them: a fixed rule for every Pillow mode, or a refusal.

| mode | rule |
|---|---|
| 1, L, P, RGB, RGBX | the colors as they are |
| CMYK, YCbCr, HSV, LAB | Pillow's conversion; embedded color profiles are ignored |
| I;16, I;16B, I;16L, I;16N, and I of PNG and PGM files | divided by 257, which maps the full range of 16 bits to 0-255 |
| LA, La, PA, RGBA, RGBa, and any mode with a transparent color | composited onto a background |
| I, F | refused, because their values have no fixed range |

Where a channel of a color image has 16 bits, Pillow itself keeps the higher 8. Images whose metadata (EXIF, XMP) say how the
camera was held are rotated and flipped accordingly.
"""

from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image

from hjepa.config.errors import UserError

WHITE = (255, 255, 255)  # background of transparent images, unless an option says otherwise

COLOR_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "LA", "La", "PA", "RGBA", "RGBa")

GRAY_FACTORS = {"L;2": 85, "L;4": 17}  # raw modes of PNG: Pillow multiplies the pixels, but not the transparent color

UPRIGHT = {  # what undoes each orientation of EXIF; Pillow's `exif_transpose` would write the metadata anew, which may fail
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MAX_ASPECT_RATIO = 8  # of images that are resized as a whole

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF


def to_rgb(image: Image.Image, background: Sequence[int] | None = WHITE) -> Image.Image:
    """Return an image in mode RGB, by the rules of this module.

    Args:
        image: Image in any mode.
        background: Color (red, green, blue) behind transparent pixels, 0 to 255. None ignores transparency, so that the colors
            under transparent pixels show.

    Raises:
        UserError: The mode has no fixed range of values, or is unknown.
    """
    colors = image
    if image.mode.startswith("I"):
        colors = reduce_to_8_bits(image)
    elif image.mode not in COLOR_MODES:
        raise UserError(f"mode {image.mode} has no fixed range of values; scale it to 8 or 16 bits and save it as PNG")
    if image.mode == "La":  # Pillow converts it to nothing else
        colors = image.convert("LA")
    if background is None or not colors.has_transparency_data:
        return turn_upright(colors.convert("RGB"), image)
    return turn_upright(composite(colors, background), image)


def shorten(image: Image.Image) -> Image.Image:
    """Crop an image that is more than 8 times as long as it is wide to its center, before it is resized by its shorter side.

    A file of some bytes that holds a line of pixels would otherwise take gigabytes.
    """
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def turn_upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Rotate and flip pixels by the orientation in the metadata of the image that they come from, which has been decoded."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata, for which Pillow raises all kinds of exceptions
        return pixels
    return pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels


def reduce_to_8_bits(image: Image.Image) -> Image.Image:
    """Return a grayscale image of integers in mode L, or LA if it has a transparent color.

    The full range of its format becomes 0-255, also if the values of this image use only a part of it.
    """
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # whose integers have 16 bits
        raise UserError("mode I, 32-bit integers, has no fixed range of values; scale it to 8 or 16 bits and save it as PNG")
    tags = getattr(image, "tag_v2", {})
    largest = 4095 if tags.get(BITS_PER_SAMPLE) in (12, (12,)) else 65535
    values = np.asarray(image).astype(np.int64)
    gray = (values * 255 + largest // 2) // largest
    if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow only heeds up to 8 bits
        gray = 255 - gray
    reduced = Image.fromarray(gray.astype(np.uint8))
    if "transparency" in image.info:
        reduced.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return reduced


def composite(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """Return a transparent image on a background, in mode RGB."""
    transparent, tile = image.info.get("transparency"), getattr(image, "tile", [])
    if isinstance(transparent, tuple) and max(transparent) > 255:
        raise UserError("a transparent color of 16 bits per channel is not supported; save it with an alpha channel")
    if isinstance(transparent, int) and tile and tile[0][3] in GRAY_FACTORS:
        image.info["transparency"] = transparent * GRAY_FACTORS[tile[0][3]]
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
