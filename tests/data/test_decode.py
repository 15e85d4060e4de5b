"""decode.py: pixel values of every kind of file that docs/data.md lists, and what is refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sasa.data.decode import UnsupportedImageError, decode, largest_of_16_bits
from sasa.data.images import Evaluated, Files, ImageFiles, Key, resize_tensor

SIDE = 16
RAMP = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 256).astype(np.uint8)  # every gray value once
GRAY = np.repeat(RAMP[..., None], 3, 2)
RAMP_16 = RAMP.astype(np.uint16) * 257  # 0..65535


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def png(
    bits: int, colour: int, pixels: np.ndarray, *extra: tuple[bytes, bytes], width: int | None = None
) -> io.BytesIO:
    """A PNG written by hand: Pillow writes no 16-bit colour. `width`: of pixels that are packed into bytes."""
    head = struct.pack(">IIBBBBB", width or pixels.shape[1], pixels.shape[0], bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    chunks = [(b"IHDR", head), *extra, (b"IDAT", data), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def tiff(pixels: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, order: str = "<") -> io.BytesIO:
    """An uncompressed gray TIFF."""
    tags = {256: pixels.shape[1], 257: pixels.shape[0], 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1,
            278: pixels.shape[0], 279: pixels.nbytes, 339: sample_format}  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4)
    return io.BytesIO(head.ljust(200, b"\0") + pixels.tobytes())


def pixels(file: io.BytesIO) -> np.ndarray:
    image = decode(file)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "file",
    [
        png(16, 0, RAMP_16.astype(">u2")),
        tiff(RAMP_16.astype("<u2"), 16),
        tiff(RAMP_16.astype(">u2"), 16, order=">"),
        tiff((65535 - RAMP_16).astype("<u2"), 16, photometric=0),
        io.BytesIO(b"P5\n16 16\n65535\n" + RAMP_16.astype(">u2").tobytes()),
        io.BytesIO(b"P5\n16 16\n4095\n" + (RAMP_16 >> 4).astype(">u2").tobytes()),
    ],
    ids=["png", "tiff", "tiff-big-endian", "tiff-white-is-zero", "pgm", "pgm-of-12-bits"],
)
def test_16_bit_gray_is_scaled_by_its_full_range(file):
    assert np.array_equal(pixels(file), GRAY)


def test_the_largest_16_bit_pixel_where_it_is_read_as_it_is_stored():
    """Of 12 bits a TIFF is refused, and with white as 0 it would be nearly white."""
    dark = np.full((16, 16), 4000, np.uint16)
    packed = np.frombuffer(bytes(16 * 24), np.uint8).reshape(16, 24)  # 16 pixels of 12 bits a row
    twelve = (
        tiff(packed, 12).getvalue().replace(struct.pack("<HHII", 256, 4, 1, 24), struct.pack("<HHII", 256, 4, 1, 16))
    )
    assert largest_of_16_bits(tiff(dark.astype("<u2"), 16)) == 4000
    assert largest_of_16_bits(png(16, 0, dark.astype(">u2"))) == 4000
    assert largest_of_16_bits(io.BytesIO(twelve)) is None
    assert largest_of_16_bits(tiff(dark.astype("<u2"), 16, photometric=0)) is None
    assert largest_of_16_bits(png(8, 0, RAMP)) is None
    with pytest.raises(UnsupportedImageError, match="12-bit gray has no agreed range"):
        decode(io.BytesIO(twelve))


def test_16_bit_colour_and_8_bit_inverted_gray():
    colour = np.stack((RAMP_16, RAMP_16.T, 65535 - RAMP_16), 2)
    assert np.array_equal(pixels(png(16, 2, colour.astype(">u2"))), (colour >> 8).astype(np.uint8))
    assert np.array_equal(pixels(tiff(255 - RAMP, 8, photometric=0)), GRAY)
    packed = (RAMP[:, ::2] & 0xF0) | (RAMP[:, 1::2] >> 4)  # two pixels of 4 bits a byte
    wide = io.BytesIO(
        tiff(packed, 4).getvalue().replace(struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 16))
    )
    assert np.array_equal(pixels(wide), (GRAY >> 4) * 17)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (tiff((RAMP / 255).astype("<f4"), 32, 3), "float pixels have no agreed range"),
        (tiff(RAMP.astype("<i4") << 15, 32, 2), "integer pixels have no agreed range"),
        (tiff(RAMP.astype("<u4") << 24, 32), "integer pixels have no agreed range"),
        (tiff(RAMP_16.astype("<i2"), 16, 2), "integer pixels have no agreed range"),
        (tiff(RAMP.astype("<i1"), 8, 2), "signed 8-bit pixels have no agreed range"),
        (tiff((RAMP / 255).astype("<f2"), 16, 3), "pixels that Pillow does not read: save it"),
        (io.BytesIO(b"Pf\n16 16\n-1.0\n" + RAMP.astype("<f4").tobytes()), "float pixels have no agreed range"),
        (png(16, 0, RAMP_16.astype(">u2"), (b"tRNS", b"\0\1")), "transparent value"),
        (png(16, 2, np.dstack([RAMP_16] * 3).astype(">u2"), (b"tRNS", b"\1\0" * 3)), "transparent value"),
        (io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n%%EOF\n"), "no image of a kind"),
    ],
    ids=["float", "int32", "uint32", "int16", "int8", "half", "pfm", "gray-trns", "colour-trns", "eps"],
)  # fmt: skip
def test_pixels_without_an_agreed_range_and_other_kinds_of_files_are_refused(file, words):
    with pytest.raises(UnsupportedImageError, match=words):
        decode(file)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_gray_value_is_of_the_files_own_bits(bits):
    """Each value in turn, and one that no pixel has: Pillow spreads the pixels over 0..255, but not that value."""
    most = 2**bits - 1
    values = np.arange(most + 1) if bits < 8 else np.array([0, 1, 7, 85, 254, 255])
    row = np.packbits((values[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8).flatten())[None]
    for clear in (*values.tolist(), *([most + 1] if bits > 1 else [])):
        file = png(bits, 0, row, (b"tRNS", struct.pack(">H", clear)), width=len(values))
        wanted = np.where(values == clear, 0, values * (255 // most))
        assert np.array_equal(pixels(file)[0], np.repeat(wanted[:, None], 3, 1)), clear


def test_what_is_transparent_becomes_black():
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[:, :5], alpha[:, 5] = 255, 128
    hidden = np.dstack((np.full_like(RAMP, 200), RAMP, RAMP.T, alpha))
    expected = (hidden[..., :3] * (alpha[..., None] / 255)).round()
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert np.abs(pixels(encoded(Image.fromarray(hidden), kind, **options)) - expected).max() <= 1
    gray = np.abs(pixels(encoded(Image.fromarray(np.dstack((RAMP, alpha))), "PNG")) - GRAY * (alpha[..., None] / 255))
    assert gray.max() <= 1
    palette = Image.fromarray(hidden[..., :3]).quantize(8)
    shown = np.asarray(palette.convert("RGB")) * (np.asarray(palette) != 3)[..., None]
    assert np.array_equal(pixels(encoded(palette, "PNG", transparency=3)), shown)
    keyed = encoded(Image.fromarray(GRAY), "PNG", transparency=(7, 7, 7))
    assert np.array_equal(pixels(keyed), GRAY * (GRAY != 7))
    opaque = np.dstack((hidden[..., :3], np.full_like(alpha, 255)))
    assert np.array_equal(pixels(encoded(Image.fromarray(opaque), "PNG")), opaque[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_is_applied_once(orientation, kind):
    stored = Image.fromarray(np.ascontiguousarray(GRAY[:12]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    file = encoded(stored, kind, exif=exif, **options)
    marked = stored.copy()
    marked.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(marked)).astype(int)
    found = pixels(file)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 3 * (kind == "JPEG")


def test_a_damaged_exif_does_not_spoil_the_picture():
    file = encoded(Image.fromarray(GRAY), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken", quality=95)
    assert np.abs(pixels(file).astype(int) - GRAY).mean() < 8


def test_the_first_picture_of_several_and_other_endings(tmp_path):
    second = Image.new("RGB", (SIDE, SIDE), "blue")
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        file = encoded(Image.fromarray(GRAY), kind, save_all=True, append_images=[second], **options)
        assert np.array_equal(pixels(file), GRAY)
    (tmp_path / "a.JPEG").write_bytes(encoded(Image.fromarray(GRAY), "PNG").getvalue())
    image, label, bad = sample(tmp_path / "a.JPEG", SIDE)
    assert (label, bad) == (0, []) and image.shape == (3, SIDE, SIDE)


def sample(path, size, crop=None, evaluated=None):
    return ImageFiles(Files([str(path)]), [0], size, False, evaluated)[Key(0, crop)]


def test_a_pipe_and_a_file_of_another_kind_are_bad_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    image, _, bad = sample(tmp_path / "pipe.png", SIDE)
    assert image is None and bad == [f"{tmp_path / 'pipe.png'}: not a regular file"]
    image, _, bad = sample(tmp_path / "none.png", SIDE)
    assert image is None and "No such file" in bad[0]


@pytest.mark.parametrize("size", [(1, 8000), (8000, 1), (3, 9001)])
def test_a_strip_is_evaluated_by_its_middle_in_little_memory(tmp_path, size, monkeypatch):
    """Both ends black, the middle white: 256 pixels of short side would make 2 million of the long one."""
    from torchvision.transforms.v2 import functional

    strip = np.zeros((size[1], size[0]), np.uint8)
    middle = (slice(3500, 5500) if size[1] > 10 else slice(None), slice(3500, 5500) if size[0] > 10 else slice(None))
    strip[middle] = 255
    Image.fromarray(strip).save(tmp_path / "strip.png")
    largest, resize = [], functional.resize
    monkeypatch.setattr(functional, "resize", lambda *a, **o: largest.append(resize(*a, **o)) or largest[-1])
    image, _, bad = sample(tmp_path / "strip.png", 224)
    assert bad == [] and image.shape == (3, 224, 224) and image.min() == 255
    assert max(result.numel() for result in largest) <= 4_000_000
    for crop in np.random.default_rng(0).random((4, 10, 4)):
        assert sample(tmp_path / "strip.png", 224, crop)[0].shape == (3, 224, 224)


def test_pictures_that_are_no_strips_keep_every_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    from torchvision.transforms.v2 import functional

    whole = functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [18], antialias=True)
    assert torch.equal(sample(tmp_path / "wide.png", 16)[0], functional.center_crop(whole, [16, 16]))


def test_evaluation_by_size_crop_and_interpolation(tmp_path):
    from torchvision.transforms.v2 import InterpolationMode, functional

    photo = np.random.default_rng(1).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    for fed in (Evaluated(20, 30, "bicubic"), Evaluated(32, 32), Evaluated(17, 40, "bilinear")):
        mode = InterpolationMode(fed.interpolation)
        by_hand = functional.center_crop(functional.resize(tensor, [fed.resize], mode, antialias=True), [fed.size] * 2)
        assert torch.equal(sample(tmp_path / "a.png", 16, evaluated=fed)[0], by_hand)
    square = tensor[None, :, :50]
    for fed in (Evaluated(20, 30, "bicubic"), Evaluated(17, 40, "bilinear"), Evaluated(50, 50)):
        options = {"mode": fed.interpolation, "antialias": True}
        whole = torch.nn.functional.interpolate(square.float(), (fed.resize, fed.resize), **options)
        by_hand = functional.center_crop(whole.round().clamp(0, 255).byte(), [fed.size] * 2)
        assert torch.equal(resize_tensor(square, fed), by_hand)
