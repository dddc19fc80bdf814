"""Images in: everything a camera or an operator may hand over. Images out: heatmaps."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchcore_plugin.bundle import Preprocessing
from patchcore_plugin.drawings import save_drawing
from patchcore_plugin.images import ImageError, ImageTooLargeError, find_images, read_image
from patchcore_plugin.runtime.heatmap import overlay

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def encoded(mode="RGB", form="PNG", size=(40, 30)) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    stream = io.BytesIO()
    image.convert(mode).save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"),
        ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("L", "TIFF"), ("RGB", "WEBP"),
    ],
)  # fmt: skip
def test_every_kind_is_read_as_training_reads_it(tmp_path, mode, form):
    from anomalib.data.utils import read_image as anomalib_read_image

    path = tmp_path / f"image.{form.lower()}"
    path.write_bytes(encoded(mode, form))
    expected = (anomalib_read_image(path, as_tensor=True).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    np.testing.assert_array_equal(read_image(path), expected)
    np.testing.assert_array_equal(read_image(io.BytesIO(path.read_bytes())), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_large_images_are_converted_as_small_ones(mode):
    """Band by band."""
    pixels = np.random.default_rng(0).integers(0, 256, (1301, 1009, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture = Image.frombytes(mode, picture.size, picture.tobytes()) if mode in ("LAB", "HSV") else picture.convert(mode)
    np.testing.assert_array_equal(read_image(picture), np.asarray(picture.convert("RGB")))


def test_arrays_and_pil_images():
    gray = np.random.default_rng(0).integers(0, 256, (5, 4), dtype=np.uint8)
    color = np.stack([gray] * 3, axis=2)
    for source in (
        gray,
        gray[:, :, None],
        color,
        color[::1, ::-1][:, ::-1],
        Image.fromarray(gray),
        Image.fromarray(color),
    ):
        result = read_image(source)
        np.testing.assert_array_equal(result, color)
        assert result.dtype == np.uint8


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "The array .* it holds float32 values, and without intensity_range"),
        (np.zeros((4, 4), np.uint16), "it holds uint16 values"),
        (np.zeros((4, 4), bool), "its values must be integers or floats, got bool"),
        (np.zeros((4, 4), complex), "got complex128"),
        (np.zeros((4, 4, 4), np.uint8), r"got \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (np.zeros(5, np.uint8), r"got \(5,\)"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        read_image(array)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_no_image(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png cannot be read as an image"):
        read_image(path)
    with pytest.raises(ImageError, match="The image data cannot be read as an image"):
        read_image(io.BytesIO(content))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        *((kind(b"\x89PNG\0"), f"{kind.__name__} cannot .* io.BytesIO") for kind in (bytes, bytearray, memoryview)),
        *((kind("a\0b.png"), r"^a\\x00b.png cannot be read as an image: it has a null byte") for kind in (str, Path)),
        *((value, "an image is a path, an open binary file, a PIL image or an array") for value in (None, 3, ["a.png"])),
    ],
)
def test_what_is_no_source(source, said):
    with pytest.raises(ImageError, match=said):
        read_image(source)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


def test_decompression_bomb():
    stream = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(stream, "PNG")
    with pytest.raises(ImageError, match=r"30000 x 30000 pixels|decompression bomb"):
        read_image(io.BytesIO(stream.getvalue()))


@settings(max_examples=150)
@given(data=st.data(), form=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]))
def test_damaged_images_are_refused_or_read(data, form):
    """Truncated or flipped bytes give an image or an ImageError, never anything else."""
    content = bytearray(encoded(form=form))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        result = read_image(io.BytesIO(bytes(content)))
    except ImageError:
        return
    assert result.ndim == 3
    assert result.dtype == np.uint8


def test_find_images(tmp_path):
    for name in ("b.PNG", "sub/a.jpg", "note.txt", ".hidden/c.png", "sub/.d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images(tmp_path) == find_images(str(tmp_path)) == [tmp_path / "b.PNG", tmp_path / "sub" / "a.jpg"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no image"):
        find_images(tmp_path / "empty")


def test_linked_images_are_found_once(tmp_path, caplog):
    """By the path without a link, where there is one; links that lead round in a circle have an end."""
    folder, other = tmp_path / "parts", tmp_path / "other"
    for file in (folder / "sub/a.png", folder / "z.png", other / "deep/b.png", other / ".hidden/c.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    links = {"again": "sub", "circle": ".", "sub/up": "../sub", "y.png": "z.png", "self.png": "self.png"}
    links |= {"linked": other, "deeper": other / "deep", "one.png": other / "deep/b.png"}
    links |= {"visible": other / ".hidden", ".secret": other / ".hidden"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found = find_images(folder)
    assert found == sorted(found)
    assert sorted(path.name for path in found) == ["a.png", "b.png", "c.png", "z.png"]
    assert {folder / "sub/a.png", folder / "z.png", folder / "visible/c.png"} < set(found)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'self.png'} is left out: the link cannot be followed (Too many levels of symbolic links)."
    ]


def test_what_is_no_regular_file_is_named(tmp_path, caplog):
    """Nothing waits for a pipe, and nothing is lost in silence."""
    (tmp_path / "a.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    for name, target in {
        "gone": "nowhere",
        "device.png": "/dev/zero",
        "to_pipe.png": "pipe.png",
        "pipe": "pipe.png",
    }.items():
        (tmp_path / name).symlink_to(target)
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    said = {record.getMessage() for record in caplog.records}
    assert said == {
        *(f"{tmp_path / name} is left out: it is no regular file." for name in ("pipe.png", "device.png", "to_pipe.png")),
        f"{tmp_path / 'gone'} is left out: the link cannot be followed (No such file or directory).",
    }


def test_drawings_are_no_images(tmp_path, caplog):
    """The heatmaps of an earlier run, wherever they lie now; a part with such a name is an image."""
    picture = Image.new("RGB", (8, 8))
    save_drawing(picture, tmp_path / "a.png.png")
    with pytest.raises(ImageError, match="holds no image"):
        find_images(tmp_path)
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.png.png").rename(tmp_path / "moved" / "a.png.explain.png")
    picture.save(tmp_path / "a.png.png")
    assert find_images(tmp_path) == [tmp_path / "a.png.png"]
    assert "1 pictures that patchcore drew are left out" in caplog.messages[-1]
    assert Image.open(tmp_path / "moved" / "a.png.explain.png").size == (8, 8)


def test_overlay_leaves_normal_parts_plain_and_reddens_anomalous_ones():
    image = np.full((90, 120, 3), 100, np.uint8)
    values = np.zeros((64, 64), np.float32)
    values[:, 48:] = 1
    picture = np.asarray(overlay(image, values, Preprocessing(resize=(64, 64), **IMAGENET))).astype(int)
    assert picture.shape == image.shape
    assert (picture[:, :80] == 100).all()
    assert (picture[:, 100:, 0] - picture[:, 100:, 2] > 100).all()


def test_overlay_stays_within_the_crop():
    image = np.full((200, 100, 3), 50, np.uint8)
    recipe = Preprocessing(resize=(64, 64), crop=(32, 32), **IMAGENET)
    picture = np.asarray(overlay(image, np.ones((32, 32), np.float32), recipe))
    changed = np.argwhere((picture != 50).any(2))
    assert changed.min(0).tolist() == [50, 25]
    assert changed.max(0).tolist() == [149, 74]


def test_postscript_is_never_opened(monkeypatch):
    """Pillow would hand it to Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageError, match="not one of PNG"):
        read_image(io.BytesIO(eps))


@pytest.mark.parametrize("size", [(12_000, 12_000), (0, 0), (0, 5)])
def test_too_many_or_no_pixels(size):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels; an image may have 1 to 90,000,000"):
        read_image(Image.new("1", size))


@pytest.mark.parametrize("size", [(40_000, 10), (1, 33_000)])
def test_too_long(size):
    """A line of pixels, small as a file, whose resize would need a huge matrix."""
    reason = f"cannot be read as an image: it has {size[0]} x {size[1]} pixels; a side may have at most 32,768$"
    for image in (Image.new("1", size), np.zeros((*size[::-1], 3), np.uint8)):
        with pytest.raises(ImageTooLargeError, match=reason):
            read_image(image)
