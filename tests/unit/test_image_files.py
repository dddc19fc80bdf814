"""Files whose header and data do not agree, or which hold more than one image."""

import io

import numpy as np
import pytest
import tifffile
from helpers.pictures import encoded
from PIL import Image

from patchcore_plugin.images import ImageError, check_depth, read_image

ENCODINGS = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"optimize": True}]


def picture(size=(200, 160), mode="RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size).convert(mode)


def with_size(content: bytes, width: int, height: int) -> bytes:
    """A JPEG file whose header states another size."""
    place = next(content.index(bytes([255, frame, 0])) for frame in (0xC0, 0xC2) if bytes([255, frame, 0]) in content)
    return content[: place + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + content[place + 9 :]


@pytest.mark.parametrize("options", ENCODINGS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_header_that_lies(options, mode):
    content = encoded(picture(mode=mode), "JPEG", quality=90, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(read_image(io.BytesIO(content)), expected)
    np.testing.assert_array_equal(read_image(io.BytesIO(content + content)), expected)  # cameras append previews
    for width, height in ((200, 320), (400, 160), (232, 192)):
        with pytest.raises(ImageError, match=f"its header says {width} x {height} pixels, and it has data for fewer"):
            read_image(io.BytesIO(with_size(content, width, height)))
    for width, height in ((200, 80), (100, 160)):
        with pytest.raises(ImageError, match=f"its header says {width} x {height} pixels, and it has data for more"):
            read_image(io.BytesIO(with_size(content, width, height)))


def test_data_that_end_too_early(tmp_path):
    """As after an interrupted copy that something mended: libjpeg fills the rest with gray."""
    content = encoded(picture(), "JPEG")
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    with pytest.raises(ImageError, match=r"half\.jpg .* data for fewer"):
        read_image(tmp_path / "half.jpg")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("value", [0, 127, 128, 129, 255])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (200, 160)])
def test_flat_images_are_read(progressive, value, size):
    """Also those of the gray that libjpeg fills with."""
    content = encoded(Image.new("L", size, value), "JPEG", progressive=progressive)
    assert (abs(read_image(io.BytesIO(content)).astype(int) - value) <= 1).all()


def read_loaded(path):
    with Image.open(path) as image:
        image.load()
        return read_image(image)


@pytest.mark.parametrize("form", ["TIFF", "PNG", "WEBP"])
def test_several_pages_are_refused(form, tmp_path):
    pages = [picture(), *(picture().rotate(turn) for turn in (90, 180))]
    path = tmp_path / f"stack.{form.lower()}"
    path.write_bytes(encoded(pages[0], form, save_all=True, append_images=pages[1:]))
    for read in (read_image, lambda path: check_depth(path, None), lambda path: read_image(Image.open(path)), read_loaded):
        with pytest.raises(ImageError, match=r"it has 3 pages \(frames\), and a score is for one"):
            read(path)
    path.write_bytes(encoded(pages[0], form, save_all=True))
    assert read_image(path).shape == (160, 200, 3)


def test_small_copies_are_no_pages():
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(np.full((40, 40), 7, np.uint8))
        writer.write(np.zeros((20, 20), np.uint8), subfiletype=1)
    assert (read_image(stream) == 7).all()


def test_many_pages_are_not_counted_to_the_end():
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for _ in range(150):
            writer.write(np.zeros((4, 4), np.uint8), metadata=None)
    with pytest.raises(ImageError, match="it has more than 100 pages"):
        read_image(stream)


def test_pictures_of_a_jpeg_beside_the_first_are_passed_over():
    """Phones and stereo cameras write them, such as previews."""
    content = encoded(picture(), "MPO", save_all=True, append_images=[picture().rotate(90)])
    np.testing.assert_array_equal(
        read_image(io.BytesIO(content)), np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    )


@pytest.mark.parametrize("options", [{"bigtiff": True}, {"byteorder": ">"}])
def test_pages_of_other_tiffs(options):
    for pages, shape in ((3, (6, 5)), (1, (6, 5))):
        stream = io.BytesIO()
        with tifffile.TiffWriter(stream, **options) as writer:
            for _ in range(pages):
                writer.write(np.zeros(shape, np.uint8), metadata=None)
        if pages == 1:
            assert read_image(stream).shape == (6, 5, 3)
        else:
            with pytest.raises(ImageError, match="it has 3 pages"):
                read_image(stream)
