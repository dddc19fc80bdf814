"""Image files: find them, decode them to RGB as training does, refuse what is no image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.image_checks import check_image_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Source = str | Path | BinaryIO | Image.Image | NDArray[np.uint8]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""File name endings of images, in lower case."""

# Pillow's names of the same formats. Without them Pillow would open PostScript too, and pass it to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")

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


def read_image(source: Source, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image to RGB.

    Pillow converts palette, gray, alpha, CMYK and 16-bit images, as anomalib does in training. The EXIF rotation is ignored,
    as there.

    Args:
        source: Path of an image file, an open binary file, a PIL image, or an array (H, W), (H, W, 1) or (H, W, 3), u8,
            RGB.
        max_pixels: Most pixels of a file or PIL image that are decoded.

    Returns:
        RGB image (H, W, 3), u8, contiguous.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImageTooLargeError: If the image has more than ``max_pixels`` pixels, or a side longer than :data:`MAX_SIDE`.
        ImageError: If the file cannot be decoded, or the array has another shape or type.
    """
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if isinstance(source, Image.Image):
            return _from_pil(source, max_pixels)
        with _open(source) as image:
            return _from_pil(image, max_pixels)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise nearly any exception on hostile bytes
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its message shows the path, or an object's address
            reason = f"it is damaged, or not one of {', '.join(_FORMATS)}"
        large = isinstance(error, ImageTooLargeError | Image.DecompressionBombError)
        msg = f"{_name(source)} cannot be read as an image: {reason}"
        raise (ImageTooLargeError if large else ImageError)(msg, reason) from error


def _open(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image file, once it is known that to decode it takes no longer than its pixels do."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            check_image_file(file)
    else:
        check_image_file(source)
    return Image.open(source, formats=_FORMATS)


def _name(source: Source) -> str:
    if isinstance(source, np.ndarray):
        return "The array"
    return str(source) if isinstance(source, str | Path) else "The image data"


def _from_pil(image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    if not 0 < image.width * image.height <= max_pixels:
        msg = f"it has {image.width} x {image.height} pixels; an image may have 1 to {max_pixels:,}"
        raise ImageTooLargeError(msg)
    _check_sides(image.height, image.width)
    return np.asarray(image.convert("RGB"))


def _from_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        msg = f"it must be uint8 with values 0 to 255, got {array.dtype}; scale and cast it first"
        raise ImageError(msg)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        msg = f"its shape must be (H, W), (H, W, 1) or (H, W, 3), got {array.shape}"
        raise ImageError(msg)
    _check_sides(*array.shape[:2])
    return np.ascontiguousarray(array)


def _check_sides(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        msg = f"it has {width} x {height} pixels; a side may have at most {MAX_SIDE:,}"
        raise ImageTooLargeError(msg)


def find_images(folder: str | Path) -> list[Path]:
    """Find the image files below a folder, hidden ones left out.

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
        msg = f"There is no folder {folder}."
        raise FileNotFoundError(msg)
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        msg = f"{folder} holds no image (a file that ends in {', '.join(sorted(SUFFIXES))})."
        raise ImageError(msg)
    return found
