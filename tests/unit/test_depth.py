"""Images deeper than 8 bits: every kind of file, array and PIL image, and the range of values that becomes 0 to 255."""

import io
import struct

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from patchcore_plugin.depth import IntensityRange, check_intensity_range, from_pixels, to_pixels
from patchcore_plugin.images import ImageError, check_depth, decode_image, read_image

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 65536, (37, 41), np.uint16)
COLOR = RANDOM.integers(0, 65536, (37, 41, 3), np.uint16)
WITH_ALPHA = RANDOM.integers(0, 65536, (37, 41, 4), np.uint16)
FULL = IntensityRange(0, 65535)


def png(values) -> bytes:
    return cv2.imencode(".png", values if values.ndim == 2 else cv2.cvtColor(values, cv2.COLOR_RGB2BGR))[1].tobytes()


def png_with_alpha(values) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(values, cv2.COLOR_RGBA2BGRA))[1].tobytes()


def tiff(values, **options) -> bytes:
    stream = io.BytesIO()
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    tifffile.imwrite(stream, values, **{"metadata": None, "photometric": photometric, **options})
    return stream.getvalue()


def tiff_of_12_bits(values) -> bytes:
    """Two values in three bytes, as some cameras write them."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=2)[:, :, 4:]
    data = np.packbits(bits.reshape(len(values), -1), axis=1).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def netpbm(kind, largest, values) -> bytes:
    height, width = values.shape[:2]
    return f"{kind} {width} {height} {largest}\n".encode() + values.astype(">u2").tobytes()


SIGNED = GRAY.astype(np.int32) - 30_000
FILES = {
    "PNG, gray": (png(GRAY), GRAY),
    "PNG, color": (png(COLOR), COLOR),
    "PNG, alpha": (png_with_alpha(WITH_ALPHA), WITH_ALPHA[..., :3]),
    "PGM": (netpbm("P5", 65535, GRAY), GRAY),
    "PGM of 12 bits": (netpbm("P5", 4095, GRAY >> 4), GRAY >> 4),
    "PPM": (netpbm("P6", 65535, COLOR), COLOR),
    "PPM of 12 bits": (netpbm("P6", 4095, COLOR >> 4), COLOR >> 4),
    "TIFF of 12 bits": (tiff_of_12_bits((GRAY >> 4)[:, :40]), (GRAY >> 4)[:, :40]),
    "TIFF, tiles": (tiff(np.tile(GRAY, (2, 2)), tile=(32, 32)), np.tile(GRAY, (2, 2))),
    "TIFF, uint32": (tiff(GRAY.astype(np.uint32) << 16), GRAY.astype(np.uint32) << 16),
    "TIFF, int8": (tiff(GRAY.astype(np.uint8).view(np.int8)), GRAY.astype(np.uint8).view(np.int8)),
    "TIFF, alpha": (tiff(WITH_ALPHA, extrasamples=["unassalpha"]), WITH_ALPHA[..., :3]),
}
for order in "<>":
    for compression in (None, "lzw", "deflate"):
        options = {"byteorder": order, "compression": compression}
        for values in (GRAY, COLOR, SIGNED.astype(np.int16), SIGNED, (GRAY / 65535).astype(np.float32)):
            FILES[f"TIFF, {values.dtype}, {values.ndim}, {order}, {compression}"] = tiff(values, **options), values


@pytest.mark.parametrize("kind", FILES)
def test_values_of_a_file(kind, tmp_path):
    """As the file holds them, whatever Pillow makes of them; as a path, a stream and a PIL image."""
    content, values = FILES[kind]
    path = tmp_path / "image"
    path.write_bytes(content)
    with Image.open(path) as image:
        found = [decode_image(source) for source in (path, io.BytesIO(content), image)]
    for each in found:
        np.testing.assert_array_equal(each, values)
        assert each.dtype.isnative
        assert each.dtype.kind == values.dtype.kind or values.dtype.itemsize < each.dtype.itemsize
    with pytest.raises(
        ImageError, match=r"image cannot be read as an image: it holds \w+ values, and without intensity_range"
    ):
        read_image(path)
    with pytest.raises(ImageError, match="intensity_range"):
        check_depth(path, None)
    check_depth(path, FULL)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.moveaxis(COLOR, 2, 0).copy(), planarconfig="separate"), "more than 8 bits a channel in a form that cannot"),
        (tiff(COLOR.astype(np.float32)), "a TIFF can have 16 bits a channel"),
        (tiff(GRAY.astype(np.float64)), "a TIFF can have 16 bits a channel"),
        (b"P2 2 1 4095\n0 4095", "more than 8 bits a channel in a form that cannot"),
        (b"P3 2 1 4095\n0 0 0 1 2 4095", "more than 8 bits a channel in a form that cannot"),
    ],
    ids=["TIFF, channel by channel", "TIFF, float32, color", "TIFF, float64", "plain PGM", "plain PPM"],
)
def test_a_kind_that_cannot_be_read_is_refused(content, reason):
    for intensity_range in (None, FULL):
        with pytest.raises(ImageError, match=reason):
            read_image(io.BytesIO(content), intensity_range=intensity_range)


def test_type_decides_and_not_the_values():
    """Values below 256 in 16 bits are deep: the next image may have others."""
    dark = (GRAY % 256).astype(np.uint16)
    for source in (dark, Image.fromarray(dark), Image.fromarray(dark.astype(np.int32)), io.BytesIO(png(dark))):
        with pytest.raises(ImageError, match="train the model with intensity_range"):
            read_image(source)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64, ">u2", ">f4"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3)])
def test_arrays_and_files_alike(dtype, shape):
    values = RANDOM.integers(0, 4096, shape).astype(dtype)
    expected = np.rint(np.broadcast_to(values.reshape(*values.shape[:2], -1), (6, 5, 3)) * (255 / 4095))
    pixels = read_image(values, intensity_range=IntensityRange(0, 4095))
    np.testing.assert_array_equal(pixels, expected)
    assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)


def test_copies_of_an_8_bit_image_give_its_pixels():
    pixels = RANDOM.integers(0, 256, (50, 40), np.uint8)
    expected = read_image(pixels)
    wide, share = pixels.astype(np.uint16) * 257, (pixels / 255).astype(np.float32)
    for values, ends in (
        (wide, FULL),
        (share, (0, 1)),
        (np.rint(pixels * 16.06), (0, 4095)),
        (pixels.astype("i4") - 9, (-9, 246)),
    ):
        for source in (values, io.BytesIO(tiff(values.astype(np.float32)))):
            np.testing.assert_array_equal(read_image(source, intensity_range=IntensityRange(*ends)), expected)


def test_values_outside_are_clipped_and_rounding_comes_last():
    values = np.float32([[-1e30, -0.1, 0, 0.49, 0.51, 254.5, 255, 256, 1e30]])
    assert to_pixels(values, IntensityRange(0, 255))[0, :, 0].tolist() == [0, 0, 0, 0, 1, 254, 255, 255, 255]
    assert to_pixels(np.uint16([[1000, 1001, 1004]]), IntensityRange(1000, 1004))[0, :, 0].tolist() == [0, 64, 255]
    large = np.uint32([[2**31, 2**31 + 128, 2**31 + 255]])
    assert to_pixels(large, IntensityRange(2**31, 2**31 + 255))[0, :, 0].tolist() == [0, 128, 255]


def test_large_images_are_scaled_piece_by_piece():
    values = RANDOM.integers(0, 65536, (1500, 1100), np.uint16)
    np.testing.assert_array_equal(to_pixels(values, FULL)[..., 0], np.rint(values / 257))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(bad, tmp_path):
    values = np.ones((4, 4), np.float32)
    values[2, 1] = bad
    (tmp_path / "thermal.tif").write_bytes(tiff(values))
    with pytest.raises(ImageError, match=r"thermal\.tif cannot be read as an image: it holds NaN or infinite values"):
        read_image(tmp_path / "thermal.tif", intensity_range=IntensityRange(0, 1))


def test_an_8_bit_image_where_a_range_is_set(tmp_path):
    """Through the range of deeper images it would be black."""
    gray = np.full((4, 4), 200, np.uint8)
    Image.fromarray(gray).save(tmp_path / "preview.png")
    for source in (gray, Image.fromarray(gray), tmp_path / "preview.png"):
        with pytest.raises(
            ImageError, match=r"it holds 8 bits \(uint8\), and intensity_range \[0, 4095\] is for deeper images"
        ):
            read_image(source, intensity_range=IntensityRange(0, 4095))
    with pytest.raises(ImageError, match=r"preview\.png"):
        check_depth(tmp_path / "preview.png", FULL)
    check_depth(tmp_path / "preview.png", None)


@given(
    low=st.floats(-1e6, 1e6),
    length=st.floats(1e-3, 1e6),
    pixels=st.lists(st.integers(0, 255), min_size=3, max_size=3),
)
def test_pixels_become_values_and_back(low, length, pixels):
    ends = check_intensity_range((low, low + length))
    image = np.uint8([[pixels]])
    np.testing.assert_array_equal(to_pixels(from_pixels(image, ends), ends), image)
    assert from_pixels(image, None) is image


WRONG_RANGES = [1, "0, 1", [1], [1, 2, 3], [2, 1], [1, 1], [0, float("nan")], [0, float("inf")], [-1.7e308, 1.7e308]]


@pytest.mark.parametrize("value", [*WRONG_RANGES, [False, True], ["0", "1"], {0, 1}])
def test_wrong_ranges(value):
    with pytest.raises(
        ValueError, match=r"intensity_range must be two finite numbers, the lower one first, e\.g\. \[0, 4095\], got"
    ):
        check_intensity_range(value)
