"""An image file's pixels: upright, opaque, 8-bit RGB, or an error that says why not. docs/data.md states the rules.

By PIL: torchvision's decoder fills a truncated JPEG with gray silently.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Raster formats only: Pillow would run Ghostscript for an EPS file, whatever its name is. JPEG opens MPO too.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "PPM", "GIF", "AVIF")
EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".avif",
)  # fmt: skip
_GRAY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PNG_GRAY_BITS = {"L;2": 2, "L;4": 4}  # by Pillow's names of how a row's pixels are packed
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class UnsupportedImageError(Exception):
    """Pixels whose range or meaning no rule states."""


@lru_cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads: AVIF is not in every build."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: BinaryIO, upright: bool = True) -> Image.Image:
    """The first picture in a file, in mode RGB.

    16-bit gray becomes 8-bit by its high byte, as Pillow does with 16-bit colour; what is transparent becomes black.

    Args:
        upright: EXIF's orientation is applied; else the picture is as it is stored (but a TIFF, which Pillow turns).

    Raises:
        UnsupportedImageError: a file of another kind; pixels without an agreed range, such as floats.
        Exception: broken files make the decoders raise anything, from OSError to struct.error.
    """
    try:
        opened = Image.open(file, formats=readable_formats())
    except UnidentifiedImageError:
        kinds = ", ".join(readable_formats())
        raise UnsupportedImageError(
            f"no image of a kind that is read ({kinds}), or of pixels that Pillow does not read: save it as 8-bit PNG"
        ) from None
    with opened as image:
        bits = _PNG_GRAY_BITS.get(image.tile[0][3], 8) if image.format == "PNG" and image.tile else 8
        image.load()
        turn = _UPRIGHT.get(_orientation(image)) if upright else None
        image = _to_rgb(image, bits)
        return image if turn is None else image.transpose(turn)


def largest_of_16_bits(file: BinaryIO) -> int | None:
    """The largest pixel of a 16-bit gray picture whose 0 is black; None of any other, which is not decoded.

    Raises as `decode`.
    """
    with Image.open(file, formats=readable_formats()) as image:
        tags = getattr(image, "tag_v2", {})
        if not _is_gray_16(image) or _bits_of(tags) != 16 or tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
            return None
        return int(np.asarray(image).max())


def _bits_of(tags: Mapping) -> int:
    """Of a pixel of gray, by a TIFF's tags; 16 where there are none."""
    bits = tags.get(_TIFF_BITS, (16,))
    return bits[0] if isinstance(bits, tuple) else bits


def _is_gray_16(image: Image.Image) -> bool:
    return image.mode in _GRAY_16 or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged note about the camera does not make the picture unreadable
        return 1


def _to_rgb(image: Image.Image, bits: int) -> Image.Image:
    """`bits`: of a gray pixel in the file, where it has 2 to 8."""
    formats = getattr(image, "tag_v2", {}).get(_TIFF_SAMPLE_FORMAT, (_UNSIGNED,))
    if image.mode == "L" and tuple(formats) != (_UNSIGNED,):  # Pillow reads 8 signed bits as unsigned
        raise UnsupportedImageError("signed 8-bit pixels have no agreed range: save it with 8 or 16 unsigned bits")
    if _is_gray_16(image):
        return _from_16_bits(image)
    if image.mode.startswith(("I", "F")):
        kind = "32-bit float" if image.mode.startswith("F") else "32-bit or signed integer"
        raise UnsupportedImageError(f"{kind} pixels have no agreed range: save it with 8 bits or 16 unsigned bits")
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:
        raise UnsupportedImageError("16-bit colour with a transparent value: save it with an alpha channel, or without")
    if isinstance(colour, int) and image.mode in ("1", "L"):
        # Pillow spreads the pixels over 0..255, but not this value; of one bit, depending on its version.
        clear = 255 * bool(colour) if image.mode == "1" else colour * 255 // (2**bits - 1)
        return image.convert("L").point([0 if value == clear else value for value in range(256)]).convert("RGB")
    if colour is not None or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(image, mask=image.getchannel("A"))
        return black
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB already


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 unsigned bits, in PIL's modes I;16 and, from PGM and old PNG readers, I."""
    tags = getattr(image, "tag_v2", {})
    bits = _bits_of(tags)
    if bits != 16:
        raise UnsupportedImageError(f"{bits}-bit gray has no agreed range here: save it with 8 or 16 bits")
    if "transparency" in image.info:
        raise UnsupportedImageError("16-bit gray with a transparent value: save it with an alpha channel, or without")
    # Not left to Pillow, which inverts a TIFF's white-is-zero gray of 8 bits but not of 16.
    high = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        high = 255 - high
    return Image.fromarray(high).convert("RGB")
