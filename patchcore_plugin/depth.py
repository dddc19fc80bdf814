"""Images deeper than 8 bits: their values as the file holds them, and the range of values that becomes 0 to 255.

Pillow opens a color image of 16 bits a channel as 8-bit RGB, without a word, and clips gray ones when it converts them.
Depth is therefore told by what the file holds, not by Pillow's mode.
"""

from __future__ import annotations

import io
import math
import re
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, SAMPLEFORMAT

from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_VALUES = 1 << 20  # that are scaled at once, in float64
_COLOR_16 = re.compile(r"RGB[AX]?;16[BLN]")
# libtiff gives values in native byte order, whatever the file's; Pillow takes these modes for the file's
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


class IntensityRange(NamedTuple):
    """The range of values that becomes 0 to 255 when an image deeper than 8 bits is read.

    Attributes:
        low: Value that becomes 0, as smaller ones do.
        high: Value that becomes 255, as larger ones do.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


def check_intensity_range(value: Any) -> IntensityRange:
    """Two finite numbers, the lower one first.

    Raises:
        UsageError: If ``value`` is something else.
    """
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    numbers = len(pair) == 2 and all(isinstance(end, Real) and not isinstance(end, bool) for end in pair)
    if not numbers or not pair[0] < pair[1] or not math.isfinite(float(pair[1]) - float(pair[0])):
        msg = f"intensity_range must be two finite numbers, the lower one first, e.g. [0, 4095], got {value!r}."
        raise UsageError(msg)
    return IntensityRange(float(pair[0]), float(pair[1]))


def check_fit(kind: str, intensity_range: IntensityRange | None) -> None:
    """Refuse images that an intensity range is not for.

    Args:
        kind: Type of an image's values; ``"uint8"`` for one of 8 bits.
        intensity_range: The range of deeper images' values; None for images of 8 bits.

    Raises:
        ValueError: If a deeper image comes without a range, or an image of 8 bits with one.
    """
    deep = kind != "uint8"
    if deep and intensity_range is None:
        msg = (
            f"it holds {kind} values, and without intensity_range only images of 8 bits (uint8) are read; train the model "
            "with intensity_range (e.g. [0, 4095], or auto), or convert the image to 8 bits"
        )
        raise ValueError(msg)
    if not deep and intensity_range is not None:
        msg = (
            f"it holds 8 bits (uint8), and intensity_range {intensity_range} is for deeper images; give an image as deep as "
            "those of the training, or train without intensity_range"
        )
        raise ValueError(msg)


def to_pixels(values: NDArray, intensity_range: IntensityRange | None) -> NDArray[np.uint8]:
    """Turn the values of an image into the pixels that the network takes.

    Values from ``low`` to ``high`` become 0 to 255; those outside are clipped. Rounding comes last.

    Args:
        values: RGB pixels (H, W, 3), u8, or the values (H, W) or (H, W, 3) of a deeper image, of any other type.
        intensity_range: The range of a deeper image's values; None for an image of 8 bits.

    Returns:
        RGB pixels (H, W, 3), u8, contiguous.

    Raises:
        ValueError: If a deeper image comes without a range, or an image of 8 bits with one; or if a value is NaN or
            infinite.
    """
    check_fit(str(values.dtype), intensity_range)
    if intensity_range is None:
        return np.ascontiguousarray(values)
    pixels = np.empty(values.shape, np.uint8)
    step = max(1, _BLOCK_VALUES // max(1, values[0].size))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        pixels[rows] = _scaled(values[rows], intensity_range)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def _scaled(values: NDArray, intensity_range: IntensityRange) -> NDArray[np.float64]:
    low, high = intensity_range
    scaled = values.astype(np.float64)
    if values.dtype.kind == "f" and not np.isfinite(scaled).all():
        msg = "it holds NaN or infinite values; give them a number first"
        raise ValueError(msg)
    with np.errstate(over="ignore"):
        scaled -= low
        scaled /= high - low
        scaled *= 255
    return np.rint(scaled.clip(0, 255, out=scaled), out=scaled)


def from_pixels(pixels: NDArray[np.uint8], intensity_range: IntensityRange | None) -> NDArray:
    """An image that :func:`to_pixels` turns into these pixels."""
    if intensity_range is None:
        return pixels
    low, high = intensity_range
    return low + pixels * ((high - low) / 255)


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image holds other values than whole numbers from 0 to 255, by its header alone.

    The type decides, not the values: a gray image of 16 bits is deep also where no value is above 255. A color image of 16
    bits must not be loaded yet, or be a TIFF: afterwards Pillow does not tell.
    """
    _, raw, largest = _tile(image)
    wide = ";16" in raw and not raw.startswith("BGR")  # BGR;16 is a whole pixel in 16 bits
    return _is_deep_gray(image) or wide or largest > 255 or max(_tags(image).get(BITSPERSAMPLE, (8,))) > 8


def read_values(image: Image.Image) -> NDArray:
    """The values of a deep image as its file holds them, alpha left out.

    Args:
        image: An opened image that :func:`is_deep`.

    Returns:
        Gray values (H, W) or RGB ones (H, W, 3): uint16, int8, int32, uint32 or float32, in native byte order.

    Raises:
        ValueError: If Pillow cannot give the values as the file holds them.
    """
    decoder, raw, largest = _tile(image)
    if _is_deep_gray(image) and decoder != "ppm_plain":
        return _gray_values(image)
    if raw == "LA;16B":  # read as RGBA: the two bytes of gray and of alpha
        return np.ascontiguousarray(np.asarray(_opened_again(image, "RGBA"))[..., :2]).view(">u2")[..., 0].astype(np.uint16)
    if decoder == "ppm" and largest > 255:
        return _color_values(image, "RGB;16", ">")
    if _COLOR_16.fullmatch(raw) and _tags(image).get(PLANAR_CONFIGURATION, 1) == 1:
        order = {"B": ">", "L": "<", "N": "="}[raw[-1]]
        return _color_values(image, raw[:-1], order)
    msg = (
        f"it has more than 8 bits a channel in a form that cannot be read ({image.format} {image.mode}); save it as PNG or "
        "TIFF of 16 bits, channels interleaved"
    )
    raise ValueError(msg)


def _is_deep_gray(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16") or (image.mode == "L" and _is_signed(image))


def _is_signed(image: Image.Image) -> bool:
    return _tags(image).get(SAMPLEFORMAT) == (2,)


def _tags(image: Image.Image) -> Any:
    """The tags of a TIFF; none for other images."""
    return getattr(image, "tag_v2", {})


def _tile(image: Image.Image) -> tuple[str, str, int]:
    """Decoder, raw mode and largest value of an image that is not loaded yet; the last is 0 where the decoder needs none."""
    if not getattr(image, "tile", None):
        return "", "", 0
    decoder, _, _, arguments = image.tile[0]
    raw, *others = arguments if isinstance(arguments, tuple) else (arguments,)
    return decoder, raw or "", others[0] if decoder.startswith("ppm") else 0


def _gray_values(image: Image.Image) -> NDArray:
    (decoder, raw, _), tags = _tile(image), _tags(image)
    if decoder == "ppm":  # it would stretch the values to 16 bits
        image = _opened_again(image, "I;16B", "raw")
    elif decoder == "libtiff" and raw in _NATIVE:
        image = _opened_again(image, _NATIVE[raw])
    values = np.asarray(image)
    if image.mode == "L":  # Pillow has no modes for signed values of 8 bits, and for unsigned ones of 32
        values = values.view(np.int8)
    elif tags.get(BITSPERSAMPLE) == (32,) and tags.get(SAMPLEFORMAT, (1,)) == (1,):
        values = values.view(np.uint32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _color_values(image: Image.Image, raw: str, order: str) -> NDArray[np.uint16]:
    """Values (H, W, 3) of a color image of 16 bits, in a byte order.

    Pillow keeps one byte of each value: the first by raw mode B, the second by L. The image is decoded by both.
    """
    decoder = "raw" if _tile(image)[0] == "ppm" else None
    values = np.empty((0, 0, 3), np.uint16)
    for place, kept in enumerate("BL"):
        half = np.asarray(_opened_again(image, raw + kept, decoder))[..., :3]
        if not place:
            values = np.empty(half.shape, np.dtype(np.uint16).newbyteorder(order))
        values.view(np.uint8).reshape(*half.shape, 2)[..., place] = half
    return values.astype(np.uint16, copy=False)


def _opened_again(image: Image.Image, raw: str, decoder: str | None = None) -> Image.Image:
    """The file of an image, opened to be decoded by another raw mode, and perhaps by another decoder."""
    image.fp.seek(0)
    again = Image.open(io.BytesIO(image.fp.read()), formats=(image.format,))
    tiles = []
    for tile in again.tile:
        name, extents, offset, arguments = tile
        others = (0, 1) if decoder else arguments[1:] if isinstance(arguments, tuple) else ()  # stride and direction
        new = getattr(tile, "_make", tuple)  # Pillow 10 has plain tuples
        tiles.append(new((decoder or name, extents, offset, (raw, *others))))
    again.tile = tiles
    return again
