"""JPEG files whose header states another size than their data have.

libjpeg fills with gray what the data lack, drops what they have too much, and tells of both by warnings, which Pillow does
not pass on.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from PIL.JpegImagePlugin import JpegImageFile

_SPARE_BYTES = 128  # that a camera may put behind the data
_FURTHER_ROWS = 64  # at least two rows of blocks, of the largest kind
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in data, 0 or a restart marker follows a byte of 255
_FRAMES, _SCAN, _END_OF_IMAGE = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}, 0xDA, 0xD9
# read where data are missing, also behind a restart marker, and passed over where they are not
_FURTHER_DATA = b"".join(bytes(range(255)) + bytes([255, restart]) for restart in range(0xD0, 0xD8)) + bytes(range(255))


def load(image: JpegImageFile) -> None:
    """Load an opened JPEG file.

    Raises:
        ValueError: If the header states another size than the data have, as far as that can be told.
    """
    image.fp.seek(0)
    data = image.fp.read()
    read = len(data)
    if "progressive" not in image.info:
        read = 0

        def read_half(_: int) -> bytes:
            """Half of what is left: what is not read when the image is complete is too much."""
            nonlocal read
            start, read = read, read + max(1, (len(data) - read) // 2)
            return data[start:read]

        image.load_read = read_half
    image.load()
    header, end = _frame_and_end(data)
    if end is None:
        return
    if _ends_filled(image):
        if not np.array_equal(np.asarray(image), np.asarray(_open(data[:end] + _FURTHER_DATA + data[end:]))):
            _refuse(image, "fewer")
    elif data[end + 1] == _END_OF_IMAGE:
        if end - read > _SPARE_BYTES:
            _refuse(image, "more")
    elif not _ends_filled(_open(_with_rows(data, header, image.height + _FURTHER_ROWS))):  # several scans, always all read
        _refuse(image, "more")


def _refuse(image: Image.Image, data: str) -> None:
    msg = f"its header says {image.width} x {image.height} pixels, and it has data for {data}; copy or save it again"
    raise ValueError(msg)


def _frame_and_end(data: bytes) -> tuple[int, int | None]:
    """Where the frame header has its content, and where the data of the first scan end; None without a marker there."""
    frame, place = 0, 2
    while (found := _MARKER.search(data, place)) is not None:
        marker, place = data[found.end() - 1], found.end()
        if marker in _FRAMES:
            frame = place + 2
        place += int.from_bytes(data[place : place + 2], "big")
        if marker == _SCAN:
            end = _MARKER.search(data, place)
            return frame, end and end.start()
    return frame, None


def _with_rows(data: bytes, frame: int, rows: int) -> bytes:
    """A JPEG file with another height in its header."""
    return data[: frame + 1] + rows.to_bytes(2, "big") + data[frame + 3 :]


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=("JPEG",))


def _ends_filled(image: Image.Image) -> bool:
    """Whether the last block of an image has the values of missing pixels."""
    left, top = ((side - 1) // 8 * 8 for side in image.size)
    last = np.asarray(image.crop((left, top, *image.size)))
    return bool(((last == 127) | (last == 128)).all())  # in gray, color and CMYK
