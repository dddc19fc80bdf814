"""Image files whose decoding takes far longer than that of their pixels are refused; all others are read as ever."""

import io
import zlib

import numpy as np
import pytest
from helpers.pictures import (
    black_png,
    bmp_of_runs,
    chunk,
    encoded,
    gray_tiff,
    jpeg_of_scans,
    jpeg_of_segments,
    png,
    tiff,
    tiff_of_strips,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchcore_plugin.image_checks import check_image_file, count_pixels
from patchcore_plugin.images import ImageError, read_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
PROFILE = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1000)))


def of_exif(**entries):
    """A TIFF file with an EXIF directory of these entries."""
    first = gray_tiff(16, 8, bytes(128), {34_665: ("I", [0])})
    other = tiff({int(code[1:]): entry for code, entry in entries.items()}, bytes(len(first) - 8))
    return gray_tiff(16, 8, other[8:], {34_665: ("I", [int.from_bytes(other[4:8], "little")])})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (jpeg_of_scans(8, 8, 100), "more than 100 scans"),
        (jpeg_of_scans(6000, 6000, 40), "pixels in all its scans"),
        (jpeg_of_segments(600, b"comment", 0xFE), "more than 500 segments"),
        (jpeg_of_segments(9, b"Exif\0\0II*\0"), "more than 8 EXIF segments"),
        (jpeg_of_segments(1, b"")[:6] + bytes(70_000) + jpeg_of_segments(0, b"")[2:], "bytes between its segments"),
        (png(8, 8, color=0, data=bytes(72), before=PROFILE * 600), "chunks beside those of its pixels"),
        (png(300, 300, data=bytes(300 * 901), before=chunk(b"IDAT", b"") * 2000), "more than 595 chunks"),
        (bmp_of_runs(40, 30), "compressed by run lengths"),
        (tiff_of_strips(2**18), "more than 262,144 numbers"),
        (tiff_of_strips(9), "more than 8 strips or tiles for an image of its size"),
        (gray_tiff(16, 8, bytes(128), {258: ("H", [8] * 300_000)}), "numbers in a TIFF directory"),
        (gray_tiff(16, 8, bytes(128), {282: ("II", [1, 3] * 1001)}), "fractions in a TIFF directory"),
        (of_exif(_282=("II", [1, 3] * 1001)), "fractions in a TIFF directory"),
        (gray_tiff(16, 8, bytes(128), {code: ("H", [1]) for code in range(40_000, 40_600)}), "entries in a TIFF directory"),
        (gray_tiff(16, 8, bytes(500), {322: ("I", [8000]), 323: ("I", [8000])}, compression=8), "pixels in its tiles"),
        (
            gray_tiff(1, 99, bytes(9000), {273: ("I", [8] * 99), 278: ("I", [1]), 279: ("I", [9000] * 99)}, compression=5),
            "bytes in its strips or tiles",
        ),
        (gray_tiff(16, 8, bytes(128), compression=34_925), "a TIFF of compression 34925; those that are read are none, LZW"),
        (b"MM\0+" + bytes(100), "no TIFF that can be read"),
    ],
)
def test_refused(tmp_path, content, reason):
    path = tmp_path / "image"
    path.write_bytes(content)
    for source in (path, str(path), io.BytesIO(content), path.open("rb")):
        with pytest.raises(ImageError, match=reason):
            read_image(source)


def test_refused_before_any_decoder_sees_it(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow opened the file"))
    for content in (jpeg_of_scans(8, 8, 20_000), tiff_of_strips(2_000_000), png(8, 8, before=chunk(b"abCd", b"") * 50_000)):
        with pytest.raises(ImageError, match="would take too long to read"):
            read_image(io.BytesIO(content))


@pytest.mark.parametrize(
    "content",
    [
        encoded(PICTURE, "JPEG", progressive=True),
        encoded(PICTURE, "JPEG", icc_profile=bytes(1_000_000), comment=b"\xff\xda" * 5000),
        encoded(PICTURE, "JPEG") + bytes(range(256)) * 5000,  # phones append a film
        encoded(PICTURE, "JPEG", restart_marker_blocks=1),
        encoded(PICTURE.convert("CMYK"), "JPEG"),
        encoded(PICTURE, "PNG"),
        png(300, 300, data=b"".join(b"\0" + row.tobytes() for row in np.asarray(PICTURE)), chunk_bytes=600),
        encoded(PICTURE, "BMP"),
        encoded(PICTURE.convert("P"), "BMP"),
        *(
            encoded(PICTURE, "TIFF", compression=name, big_tiff=large)
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")
            for large in (False, True)
        ),
        encoded(PICTURE, "TIFF", tiffinfo={278: 1}, compression="tiff_lzw"),
        encoded(PICTURE, "WEBP"),
        encoded(PICTURE, "PPM"),
    ],
)
def test_usual_files_are_read(tmp_path, content):
    """And a file is left as it was: Pillow reads it from its beginning."""
    path = tmp_path / "image"
    path.write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    for source in (path, io.BytesIO(content), path.open("rb")):
        np.testing.assert_array_equal(read_image(source), expected)


def test_large_images_pass():
    for content in (black_png(30_000, 3000), encoded(Image.new("RGB", (9400, 9400)), "JPEG", progressive=True)):
        check_image_file(io.BytesIO(content))


@settings(max_examples=300)
@given(data=st.data(), form=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF"]))
def test_damaged_files_pass_or_are_refused(data, form):
    content = bytearray(encoded(PICTURE.crop((0, 0, 20, 16)), form))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        check_image_file(io.BytesIO(bytes(content)))
    except ValueError:  # any other exception would be one of the check
        return


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (9, 700)])
def test_pixels_by_the_head(size):
    picture, exif = Image.new("RGB", size), b"Exif\0\0II*\0\x08\0\0\0\0\0"
    options = [
        *(("JPEG", {"progressive": progressive, "exif": exif}) for progressive in (False, True)),
        *(("TIFF", {"compression": name, "big_tiff": large}) for name in ("raw", "tiff_lzw") for large in (False, True)),
        *(("WEBP", {"lossless": lossless}) for lossless in (False, True)),
        *((form, {}) for form in ("PNG", "BMP")),
        ("WEBP", {"exif": exif}),
    ]
    for form, chosen in options:
        assert count_pixels(io.BytesIO(encoded(picture, form, **chosen))) == size[0] * size[1], (form, chosen)
    for content in (b"", b"BM", b"\xff\xd8", b"\x89PNG", b"RIFF----WEBPVP8 ", b"P5 1 1 255 ", b"GIF89a"):
        with pytest.raises(ValueError, match="damaged, or not one of PNG, JPEG, BMP, TIFF, WebP"):
            count_pixels(io.BytesIO(content))


def test_broken_tiffs_write_nothing_to_standard_error(capfd):
    """libtiff would, a line or more for each."""
    for name in ("tiff_lzw", "tiff_adobe_deflate"):
        content = bytearray(encoded(PICTURE, "TIFF", compression=name))
        content[200:2000] = bytes(1800)
        with pytest.raises(ImageError):
            read_image(io.BytesIO(bytes(content)))
    assert capfd.readouterr().err == ""
