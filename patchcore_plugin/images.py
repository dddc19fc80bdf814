"""Image files: find them, decode them to RGB as training does, refuse what is no image."""

from __future__ import annotations

import io
import logging
import os
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from patchcore_plugin import jpeg
from patchcore_plugin.depth import check_fit, is_deep, read_values, to_pixels
from patchcore_plugin.drawings import is_drawing
from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.folders import list_files
from patchcore_plugin.image_checks import check_image_file
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from patchcore_plugin.depth import IntensityRange

    Source = str | Path | BinaryIO | Image.Image | NDArray

_PAGED_FORMATS, _PAGES_COUNTED = ("PNG", "TIFF", "WEBP"), 100
_SUBFILE, _SMALL_COPY_OR_MASK = 254, 0b101  # a tag of TIFF, and bits of it

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""File name endings of images, in lower case."""

# Pillow's names of the same formats. Without them Pillow would open PostScript too, and pass it to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")

_BAND_PIXELS = 1 << 20

MAX_PIXELS = 90_000_000
"""Most pixels of an image file that are decoded: a PNG of a few hundred KB can claim to be many gigabytes."""

MAX_SIDE = 32_768
"""Longest side of an image, in pixels: the matrix that resizes a line of millions of pixels would be huge."""


class ImageError(PatchcoreError, ValueError):
    """An image cannot be read.

    Args:
        message: Sentence that names the image and the reason.
        reason: The reason alone, for a caller that names the image itself.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class ImageTooLargeError(ImageError):
    """An image has too many pixels."""


def read_image(
    source: Source, max_pixels: int = MAX_PIXELS, intensity_range: IntensityRange | None = None
) -> NDArray[np.uint8]:
    """Decode an image to RGB.

    Pillow converts palette, gray, alpha and CMYK images of 8 bits, as anomalib does in training. The EXIF rotation is
    ignored, as there. The values of deeper images are scaled by the intensity range.

    Args:
        source: Path of an image file, an open binary file, a PIL image, or an array (H, W), (H, W, 1) or (H, W, 3), RGB:
            u8, or any other type of integers or floats.
        max_pixels: Most pixels of a file or PIL image that are decoded.
        intensity_range: Values of images deeper than 8 bits that become 0 and 255. With it, every image must be deeper
            than 8 bits; without it, none may be. The type decides, not the values.

    Returns:
        RGB image (H, W, 3), u8, contiguous.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImageTooLargeError: If the image has more than ``max_pixels`` pixels, or a side longer than :data:`MAX_SIDE`.
        ImageError: If the file cannot be decoded, or holds several pages; if the array has another shape or type; if the
            image's depth does not fit the intensity range; or if a value is NaN or infinite.
    """
    with _named(source):
        return to_pixels(_decode(source, max_pixels), intensity_range)


def decode_image(source: Source, max_pixels: int = MAX_PIXELS) -> NDArray:
    """Decode an image to the values that it holds, for :func:`read_image` to scale later.

    Arguments and errors are those of :func:`read_image`.

    Returns:
        RGB image (H, W, 3), u8; for an image deeper than 8 bits its values (H, W) or (H, W, 3), of another type.
    """
    with _named(source):
        return _decode(source, max_pixels)


def check_depth(path: str | Path, intensity_range: IntensityRange | None) -> None:
    """Check by the header of an image file whether its depth fits an intensity range, without decoding it.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImageError: If the file is no image, or if :func:`read_image` would refuse its depth or its pages.
    """
    with _named(path), _open(path) as image:
        _check_pages(image)
        check_fit(image.mode if is_deep(image) else "uint8", intensity_range)


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Name the image in the error of whatever fails."""
    _check_source(source)
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise nearly any exception on hostile bytes
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its message shows the path, or an object's address
            formats = ", ".join(_FORMATS)
            reason = f"it is damaged, or not one of {formats} (a TIFF can have 16 bits a channel, or 32 if it is gray)"
        large = isinstance(error, ImageTooLargeError | Image.DecompressionBombError)
        msg = f"{_name(source)} cannot be read as an image: {reason}"
        raise (ImageTooLargeError if large else ImageError)(msg, reason) from error


def _check_source(source: Source) -> None:
    """Refuse what names or holds no image, before Pillow takes bytes for a path."""
    if isinstance(source, bytes | bytearray | memoryview):
        reason = "it is the content of a file; give it as an open file, io.BytesIO(content)"
    elif isinstance(source, str | os.PathLike):
        if "\0" not in str(source):
            return
        reason = "it has a null byte, so no file has this path"
    elif isinstance(source, Image.Image | np.ndarray) or hasattr(source, "read"):
        return
    else:
        reason = "an image is a path, an open binary file, a PIL image or an array"
    name = as_line(str(source)) if isinstance(source, str | os.PathLike) else f"A value of type {type(source).__name__}"
    msg = f"{name} cannot be read as an image: {reason}"
    raise ImageError(msg, reason)


def _decode(source: Source, max_pixels: int) -> NDArray:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels)
    with _open(source) as image:
        return _from_pil(image, max_pixels)


def _open(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image file, once it is known that to decode it takes no longer than its pixels do."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            check_image_file(file)
    else:
        try:
            source.seek(0)
        except (AttributeError, io.UnsupportedOperation):  # a pipe
            source = io.BytesIO(source.read())
        check_image_file(source)
    return Image.open(source, formats=_FORMATS)


def _name(source: Source) -> str:
    if isinstance(source, np.ndarray):
        return "The array"
    return str(source) if isinstance(source, str | Path) else "The image data"


def _from_pil(image: Image.Image, max_pixels: int) -> NDArray:
    if not 0 < image.width * image.height <= max_pixels:
        msg = f"it has {image.width} x {image.height} pixels; an image may have 1 to {max_pixels:,}"
        raise ImageTooLargeError(msg)
    _check_sides(image.height, image.width)
    _check_pages(image)
    if is_deep(image):
        return read_values(image)
    if image.format in ("JPEG", "MPO") and image.tile:
        jpeg.load(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert an image to RGB, a large one in bands: as a whole, Pillow would hold it three times over."""
    image.load()
    if image.width * image.height <= _BAND_PIXELS:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    pixels, rows = np.empty((image.height, image.width, 3), np.uint8), max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = band if band.mode == "RGB" else band.convert("RGB")
    return pixels


def _check_pages(image: Image.Image) -> None:
    """Refuse a file of several pages or frames. Small copies, masks, and further pictures of a JPEG do not count."""
    if image.format not in _PAGED_FORMATS or not getattr(image, "is_animated", False):
        return
    in_file = image.format == "TIFF" and image.fp is not None  # a loaded image knows
    pages = _count_tiff_pages(image.fp) if in_file else image.n_frames
    if pages > 1:
        count = f"more than {_PAGES_COUNTED}" if pages > _PAGES_COUNTED else pages
        msg = f"it has {count} pages (frames), and a score is for one; save each as a file of its own"
        raise ImageError(msg)


def _count_tiff_pages(file: BinaryIO) -> int:
    """Number of pages of a TIFF file that are images of their own; it stops behind :data:`_PAGES_COUNTED`."""
    file.seek(0)
    start = file.read(16).ljust(16, b"\0")
    order, large = "<" if start[:1] == b"I" else ">", start[2] == 43
    number, place = struct.Struct(order + ("Q" if large else "H")), struct.Struct(order + ("Q" if large else "I"))
    (page,) = place.unpack(start[8:] if large else start[4:8])
    seen, pages = set(), 0
    while page and page not in seen and pages <= _PAGES_COUNTED and len(seen) < 2 * _PAGES_COUNTED:
        seen.add(page)
        file.seek(page)
        (entries,) = number.unpack(file.read(number.size).ljust(number.size, b"\0"))
        code, kind = struct.unpack(order + "HH", file.read(4).ljust(4, b"\0"))  # entries are sorted
        count_and_value = file.read(16 if large else 8)
        value = int.from_bytes(count_and_value[place.size :][: 2 if kind == 3 else 4], "little" if order == "<" else "big")
        pages += not (code == _SUBFILE and value & _SMALL_COPY_OR_MASK)
        file.seek(min(page + number.size + (20 if large else 12) * entries, 2**62))
        (page,) = place.unpack(file.read(place.size).ljust(place.size, b"\0"))
    return pages


def _from_array(array: NDArray) -> NDArray:
    if array.dtype.kind not in "uif":
        msg = f"its values must be integers or floats, got {array.dtype}"
        raise ImageError(msg)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        msg = f"its shape must be (H, W), (H, W, 1) or (H, W, 3), got {array.shape}"
        raise ImageError(msg)
    _check_sides(*array.shape[:2])
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 and array.dtype == np.uint8 else array


def _check_sides(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        msg = f"it has {width} x {height} pixels; a side may have at most {MAX_SIDE:,}"
        raise ImageTooLargeError(msg)


def find_images(folder: str | Path) -> list[Path]:
    """Find the image files below a folder.

    Hidden files are left out, and the pictures that this package drew there itself, such as the heatmaps of an earlier run.
    Links are followed; see :func:`patchcore_plugin.folders.list_files`.

    Args:
        folder: Folder to search, its subfolders included.

    Returns:
        Paths of the files with one of :data:`SUFFIXES`, sorted.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ImageError: If the folder holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"{folder} is a file: give the folder that it is in." if folder.is_file() else f"There is no folder {folder}."
        raise FileNotFoundError(msg)
    files = list_files(folder, SUFFIXES)
    # a drawing is named as the image that it shows, with its own ending added: few other files are opened
    drawings = {file for file in files if len(file.suffixes) > 1 and is_drawing(file)}
    if drawings:
        logger.warning("Below %s, %d pictures that patchcore drew are left out, such as heatmaps.", folder, len(drawings))
    images = [file for file in files if file not in drawings]
    if not images:
        msg = f"{folder} holds no image (a file that ends in {', '.join(sorted(SUFFIXES))})."
        raise ImageError(msg)
    return images
