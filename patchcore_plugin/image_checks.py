"""Image files whose decoding would take too long, refused before a decoder sees them.

Pillow's decoders bound neither their work nor their memory by the size of the image: a JPEG file of 700 KB can hold
20,000 scans of 90 megapixels, a TIFF file of 16 x 8 pixels millions of strips, a PNG file millions of chunks. These checks
read of what parts a file is made, and no pixel. Every limit is far above what cameras and programs write.
"""

from __future__ import annotations

import ctypes
import io
import math
import re
import struct
from collections import Counter
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

JPEG_LIMITS = {
    "segments": 500,
    "scans": 100,  # libjpeg itself writes 10
    "EXIF segments": 8,  # Pillow reads the EXIF record as it reads a TIFF file
    "bytes between its segments": 65_536,
}
JPEG_SCANNED_PIXELS_LIMIT = 1_200_000_000  # a scan takes a nanosecond a pixel, even one without data
JPEG_USUAL_SCANS = 12  # have no limit but that of the image's pixels

PNG_OTHER_CHUNKS_LIMIT = 500  # than those of pixels; each may be decompressed to 1 MB
PNG_CHUNK_BYTES = 256  # smallest mean size of the chunks of a file that has more than PNG_OTHER_CHUNKS_LIMIT

TIFF_ENTRIES_LIMIT = 500  # of a directory
TIFF_VALUES_LIMIT = 2**18  # numbers in all entries of a directory, of which a strip takes two
TIFF_FRACTIONS_LIMIT = 1000
TIFF_TILED_PIXELS_LIMIT = 2**24  # of the tiles of a small image; those of a large one may have four times its pixels
TIFF_OVERLAP_LIMIT = 4  # bytes of all strips or tiles together, in sizes of the file
TIFF_COMPRESSIONS = {
    1: "none",
    5: "LZW",
    7: "JPEG",
    8: "Deflate",
    32_946: "Deflate",
    32_773: "PackBits",
    50_000: "Zstandard",
}
"""Names of the compressions of TIFF files that are read, by their codes."""


def check_image_file(file: BinaryIO) -> None:
    """Refuse a file whose decoding would take far longer than that of its pixels.

    Args:
        file: Open image file; its position is at its beginning afterwards. A file that is no PNG, JPEG, TIFF or BMP passes.

    Raises:
        ValueError: If the file is refused; the message is the reason.
    """
    file.seek(0)
    start = file.read(4)
    check = next((check for signature, check in _CHECKS.items() if start.startswith(signature)), None)
    if check is not None:
        file.seek(0)
        check(file)
    file.seek(0)


def count_pixels(file: BinaryIO) -> int:
    """Number of pixels that the head of a PNG, JPEG, BMP, TIFF or WebP file states; it takes microseconds.

    Args:
        file: Open image file; its position is at its beginning afterwards.

    Raises:
        ValueError: If the file is of another format, or its head is damaged.
    """
    file.seek(0)
    start = file.read(4)
    count = next((count for signature, count in _COUNTS.items() if start.startswith(signature)), None)
    file.seek(0)
    pixels = None
    with suppress(struct.error):
        pixels = None if count is None else count(file)
    file.seek(0)
    if pixels is None:
        msg = "it is damaged, or not one of PNG, JPEG, BMP, TIFF, WebP"
        raise ValueError(msg)
    return pixels


def _limit(count: int, limit: int, what: str) -> None:
    if count > limit:
        msg = f"it has more than {limit:,} {what}, which would take too long to read"
        raise ValueError(msg)


# The length of a segment stands behind its marker. Pillow and libjpeg skip other markers, or end there. In the data of a
# scan, a zero follows each byte FF that begins no marker.
_SEGMENT_OR_END = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1


def _check_jpeg(file: BinaryIO) -> None:
    content = file.read()
    pixels, end, found = 0, 2, Counter()
    for marker, start, after in _jpeg_segments(content):
        if not found["scans"]:
            found["bytes between its segments"] += start - end
        elif marker == _END:  # cameras write other things behind it
            return
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", content[start + 5 : start + 9].ljust(4, b"\0"))
            pixels = max(pixels, height * width)
        found["segments"] += 1
        found["scans"] += marker == _SCAN
        found["EXIF segments"] += marker == _EXIF and content[start + 4 : start + 8] == b"Exif"
        for what, limit in JPEG_LIMITS.items():
            _limit(found[what], limit, what)
        if found["scans"] > JPEG_USUAL_SCANS:
            _limit(found["scans"] * pixels, JPEG_SCANNED_PIXELS_LIMIT, "pixels in all its scans")
        end = after


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker of each segment, its first byte, and the byte behind it. An end of the image is one too, without a length."""
    end = 2
    while found := _SEGMENT_OR_END.search(content, end):
        marker, end = found[1][0], found.end()
        if marker != _END:
            end += max(2, int.from_bytes(content[end : end + 2], "big"))
        yield marker, found.start(), end


def _check_png(file: BinaryIO) -> None:
    size = file.seek(0, io.SEEK_END)
    position, chunks, others = 8, 0, 0
    while position < size:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        if name == b"IEND":
            return
        chunks += 1
        others += name != b"IDAT"
        _limit(others, PNG_OTHER_CHUNKS_LIMIT, "chunks beside those of its pixels")
        _limit(chunks, PNG_OTHER_CHUNKS_LIMIT + size // PNG_CHUNK_BYTES, "chunks")
        position += 12 + length


def _check_bmp(file: BinaryIO) -> None:
    header, compression = struct.unpack("<14xI12xI", file.read(34).ljust(34, b"\0"))
    if header > 12 and compression in (1, 2):
        msg = "it is a BMP compressed by run lengths, which are slow to read; save it without compression, or as PNG"
        raise ValueError(msg)


_BYTES, _FRACTIONS, _INTEGERS = {1, 2, 6, 7}, {5, 10}, {3: "H", 4: "I", 13: "I", 16: "Q"}
_KIND_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _PLANES = 256, 257, 259, 277, 284
_EXIF_DIRECTORIES = (34_665, 34_853, 40_965)  # Pillow reads them with the image


class _Pieces(NamedTuple):
    """Codes of the TIFF entries about an image's strips, or about its tiles."""

    places: int
    lengths: int
    width: int
    height: int


_STRIPS, _TILES = _Pieces(273, 279, _WIDTH, 278), _Pieces(324, 325, 322, 323)


def _check_tiff(file: BinaryIO) -> None:
    _silence_libtiff()
    tiff = _Tiff(file)
    compression = tiff.number(_COMPRESSION, 1)
    if compression not in TIFF_COMPRESSIONS:
        names = ", ".join(dict.fromkeys(TIFF_COMPRESSIONS.values()))
        msg = f"it is a TIFF of compression {compression}; those that are read are {names}"
        raise ValueError(msg)
    _check_pieces(tiff, _STRIPS, compressed=compression != 1)
    _check_pieces(tiff, _TILES, compressed=compression != 1)


@cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing to standard error what is wrong with a file, which Pillow's exception says too.

    Pillow has no switch for it. On Windows, libtiff is a part of Pillow's library that cannot be reached, and goes on.
    """
    with suppress(OSError, AttributeError):
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_handler(None)


def _check_pieces(tiff: _Tiff, codes: _Pieces, *, compressed: bool) -> None:
    """Check number, pixels and bytes of an image's strips or tiles, where it has them."""
    width, height = tiff.number(_WIDTH, 0), tiff.number(_HEIGHT, 0)
    wide, high = max(1, tiff.number(codes.width, width)), max(1, tiff.number(codes.height, height))
    across, down = -(-width // wide), -(-height // high)
    if codes is _TILES:  # each is decoded as a whole
        _limit(across * wide * down * high, max(TIFF_TILED_PIXELS_LIMIT, 4 * width * height), "pixels in its tiles")
        _limit(across * down, TIFF_VALUES_LIMIT, "tiles")
    planes = tiff.number(_SAMPLES, 1) if tiff.number(_PLANES, 1) == 2 else 1
    places, lengths = tiff.numbers(codes.places), tiff.numbers(codes.lengths)
    _limit(len(places), across * down * planes, "strips or tiles for an image of its size")
    if compressed:
        unknown = len(places) - len(lengths) if len(places) > 1 else 0  # of each, libtiff reads all that follows
        read = sum(min(length, tiff.size) for length in lengths) + max(0, unknown) * tiff.size
        _limit(read, TIFF_OVERLAP_LIMIT * tiff.size, "bytes in its strips or tiles for a file of its size")


class _Tiff:
    """The entries of a TIFF file's image, as Pillow and libtiff read them.

    Args:
        file: The file.

    Attributes:
        size: Size of the file, in bytes.

    Raises:
        ValueError: If it is no TIFF, or if a directory has too many entries, or too many values in them.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        start = self._read(0, 16).ljust(16, b"\0")
        if start[:4] not in (b"II*\0", b"II+\0", b"MM\0*"):  # Pillow tries others, without success
            msg = "it is no TIFF that can be read"
            raise ValueError(msg)
        self._order, self._large = "<" if start[:1] == b"I" else ">", start[2] == 43
        self._place = self._order + ("Q" if self._large else "I")
        (first,) = struct.unpack(self._place, start[8:] if self._large else start[4:8])
        self._entries = self._read_directory(first)
        self._check_exif(self._entries, 2)

    def numbers(self, code: int) -> list[int]:
        """The values of an entry of whole numbers; none if the image lacks it.

        Raises:
            ValueError: If the entry holds something else.
        """
        return self._numbers(self._entries, code)

    def number(self, code: int, default: int) -> int:
        """The first value of an entry of whole numbers, or the default; errors are those of :meth:`numbers`."""
        return next(iter(self.numbers(code)), default)

    def _check_exif(self, entries: dict[int, _Entry], depth: int) -> None:
        """Check the directories that entries point to, and those that these point to."""
        for code in _EXIF_DIRECTORIES if depth else ():
            for place in self._numbers(entries, code)[:1]:
                self._check_exif(self._read_directory(place), depth - 1)

    def _read_directory(self, place: int) -> dict[int, _Entry]:
        head, form = ("Q", "HHQ8s") if self._large else ("H", "HHI4s")
        head, form = struct.Struct(self._order + head), struct.Struct(self._order + form)
        (count,) = head.unpack(self._read(place, head.size).ljust(head.size, b"\0"))
        _limit(count, TIFF_ENTRIES_LIMIT, "entries in a TIFF directory")
        content = self._read(place + head.size, count * form.size)
        entries, found = {}, Counter()
        for code, *fields in form.iter_unpack(content[: len(content) // form.size * form.size]):
            entry = _Entry(*fields)
            if entry.kind not in _KIND_BYTES:  # Pillow and libtiff leave it out
                continue
            if code in entries:
                msg = f"it has the TIFF entry {code} twice"
                raise ValueError(msg)
            entries[code] = entry
            found["bytes"] += entry.count * _KIND_BYTES[entry.kind]
            found["values"] += 0 if entry.kind in _BYTES else entry.count
            found["fractions"] += entry.count if entry.kind in _FRACTIONS else 0
        _limit(found["bytes"], self.size, "bytes in a TIFF directory for a file of its size")
        _limit(found["values"], TIFF_VALUES_LIMIT, "numbers in a TIFF directory")
        _limit(found["fractions"], TIFF_FRACTIONS_LIMIT, "fractions in a TIFF directory")
        return entries

    def _numbers(self, entries: dict[int, _Entry], code: int) -> list[int]:
        if code not in entries:
            return []
        kind, count, content = entries[code]
        if kind not in _INTEGERS:
            msg = f"its TIFF entry {code} holds no whole numbers"
            raise ValueError(msg)
        size = count * _KIND_BYTES[kind]
        if size > len(content):
            content = self._read(*struct.unpack(self._place, content), size)
        known = min(count, len(content) // _KIND_BYTES[kind])
        return list(struct.unpack_from(f"{self._order}{known}{_INTEGERS[kind]}", content))

    def _read(self, place: int, size: int) -> bytes:
        self._file.seek(min(place, self.size))
        return self._file.read(size)


class _Entry(NamedTuple):
    """An entry of a TIFF directory.

    Attributes:
        kind: Code of the type of its values.
        count: Number of its values.
        content: The values, or, if they are longer, the place where they lie.
    """

    kind: int
    count: int
    content: bytes


def _count_jpeg(file: BinaryIO) -> int | None:
    content = file.read()
    for marker, start, _ in islice(_jpeg_segments(content), JPEG_LIMITS["segments"]):
        if marker in _FRAMES:
            return math.prod(struct.unpack_from(">HH", content, start + 5))
    return None


def _count_tiff(file: BinaryIO) -> int:
    tiff = _Tiff(file)
    return tiff.number(_WIDTH, 0) * tiff.number(_HEIGHT, 0)


def _count_bmp(file: BinaryIO) -> int:
    header, width, height = struct.unpack("<14xIii", file.read(26))
    if header == 12:
        width, height = struct.unpack("<HH", struct.pack("<i", width))
    return width * abs(height)


def _count_webp(file: BinaryIO) -> int | None:
    kind, head = struct.unpack("<12x4s14s", file.read(30))
    if kind == b"VP8X":
        return math.prod(1 + int.from_bytes(head[start : start + 3], "little") for start in (8, 11))
    if kind == b"VP8 ":
        return math.prod(size & 0x3FFF for size in struct.unpack_from("<HH", head, 10))
    bits = int.from_bytes(head[5:9], "little")
    return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF)) if kind == b"VP8L" else None


_TIFF_STARTS = (b"II*\0", b"II\0*", b"II+\0", b"MM*\0", b"MM\0*", b"MM\0+")
_CHECKS = {
    b"\xff\xd8": _check_jpeg,
    b"\x89PNG": _check_png,
    b"BM": _check_bmp,
    **dict.fromkeys(_TIFF_STARTS, _check_tiff),
}
_COUNTS = {
    b"\xff\xd8": _count_jpeg,
    b"\x89PNG": lambda file: math.prod(struct.unpack(">16xII", file.read(24))),
    b"BM": _count_bmp,
    b"RIFF": _count_webp,
    **dict.fromkeys(_TIFF_STARTS, _count_tiff),
}
