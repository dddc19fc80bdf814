"""Image files: found, decoded to RGB as training saw them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from patchcore_plugin.errors import PatchcoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
"""File name endings, in lower case, that a folder of images is searched for."""

# The same as SUFFIXES, for Pillow. It would also open PostScript, and hand that to Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")

MAX_PIXELS = 90_000_000
"""Largest image file that is decoded, in pixels: a few hundred KB of PNG can claim to be many gigabytes."""

MAX_SIDE = 32_768
"""Longest side of an image, in pixels: a line of millions of pixels would make its resize's matrix huge."""


class ImageError(PatchcoreError, ValueError):
    """Something given as an image cannot be read as one.

    Args:
        message: What, and why.
        reason: Why alone, for those who know what.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class ImageTooLargeError(ImageError):
    """An image has too many pixels."""


def read_image(
    source: str | Path | BinaryIO | Image.Image | NDArray[np.uint8], max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode an image to RGB.

    Palette, grey, alpha, CMYK and 16-bit images are converted by Pillow, just as anomalib does when it trains; an EXIF
    rotation is not applied, as it is not there either.

    Args:
        source: Path of an image file, an open binary file, a PIL image, or an array (H, W), (H, W, 1) or (H, W, 3), u8,
            RGB.
        max_pixels: Of a file or PIL image; more are not decoded.

    Returns:
        RGB image (H, W, 3), u8, contiguous.

    Raises:
        FileNotFoundError: If there is no such file.
        ImageTooLargeError: If it has too many pixels, or more on a side than :data:`MAX_SIDE`.
        ImageError: If it cannot be decoded, or an array has another shape or type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    label = str(source) if isinstance(source, str | Path) else "the image data"
    try:
        if isinstance(source, Image.Image):
            return _from_pil(source, max_pixels)
        with Image.open(source, formats=_FORMATS) as image:
            return _from_pil(image, max_pixels)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # it says where the file lies
            reason = f"it is not one of {', '.join(_FORMATS)}, or damaged"
        large = isinstance(error, ImageTooLargeError | Image.DecompressionBombError)
        msg = f"{label} cannot be read as an image: {reason}"
        raise (ImageTooLargeError if large else ImageError)(msg, reason) from error


def _from_pil(image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    pixels = image.width * image.height
    if not 0 < pixels <= max_pixels:
        msg = f"it has {image.width} x {image.height} pixels, and from 1 to {max_pixels:,} are read"
        raise ImageTooLargeError(msg)
    _check_sides(image.height, image.width)
    return np.asarray(image.convert("RGB"))


def _check_sides(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        msg = f"it has {width} x {height} pixels, and at most {MAX_SIDE:,} on a side are read"
        raise ImageTooLargeError(msg)


def _from_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        msg = f"An image array must be uint8 with values 0 to 255, got {array.dtype}. Scale and cast it first."
        raise ImageError(msg)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        msg = f"An image array must have shape (H, W), (H, W, 1) or (H, W, 3), got {array.shape}."
        raise ImageError(msg)
    _check_sides(*array.shape[:2])
    return np.ascontiguousarray(array)


def find_images(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted, hidden ones left out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ImageError: If it holds no image.
    """
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
        msg = f"{folder} holds no image. Endings looked for: {', '.join(sorted(SUFFIXES))}."
        raise ImageError(msg)
    return found
