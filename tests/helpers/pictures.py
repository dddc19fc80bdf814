"""Pictures as the bytes of image files, and files whose decoding takes far longer than that of their pixels."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image


def encoded(picture, form="PNG", **options) -> bytes:
    """The bytes of a picture's file, in one of Pillow's formats; options are those of Pillow."""
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth=8, color=2, data=b"", before=b"", chunk_bytes=None) -> bytes:
    """A PNG file.

    Args:
        width: Width that the header states.
        height: Height that the header states.
        depth: Bits of a value.
        color: Kind of pixels: 0 for gray, 2 for RGB.
        data: Rows of pixels, each behind the number of its filter.
        before: Chunks before those of the pixels.
        chunk_bytes: Compressed bytes in each chunk of pixels; None for a single chunk.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    content = zlib.compress(data)
    step = chunk_bytes or len(content)
    pixels = b"".join(chunk(b"IDAT", content[start : start + step]) for start in range(0, len(content), step))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + chunk(b"IEND", b"")


def black_png(width, height, color=0) -> bytes:
    """A small PNG file of many pixels: 90 megapixels of gray are 86 KiB."""
    row = bytes(1 + width * (1 if color == 0 else 3))
    return png(width, height, color=color, data=row * height)


def jpeg_of_scans(width, height, scans) -> bytes:
    """A progressive JPEG file of gray that repeats its last scan, which changes nothing, for 31 bytes or a little more."""
    content = encoded(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * scans + content[-2:]


def jpeg_of_segments(count, content, marker=0xE1) -> bytes:
    """A JPEG file of 8 x 8 pixels with many segments of one content before its own."""
    picture = encoded(Image.new("L", (8, 8)), "JPEG")
    return picture[:2] + (struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content) * count + picture[2:]


def tiff(entries, data=b"") -> bytes:
    """A TIFF file.

    Args:
        entries: Type and values of each entry, by its code. Types: "H" for 16 bits, "I" for 32 bits, "II" for fractions.
        data: What the file holds from its byte 8 on.
    """
    place = 8 + len(data)
    table, values = struct.pack("<H", len(entries)), b""
    behind = place + 2 + 12 * len(entries) + 4
    for code, (kind, numbers) in sorted(entries.items()):
        content = struct.pack(f"<{len(numbers)}{kind[0]}", *numbers)
        count = len(numbers) // len(kind)
        inside = content if len(content) <= 4 else struct.pack("<I", behind + len(values))
        table += struct.pack("<HHI4s", code, {"H": 3, "I": 4, "II": 5}[kind], count, inside)
        values += content if len(content) > 4 else b""
    return struct.pack("<4sI", b"II*\0", place) + data + table + bytes(4) + values


def gray_tiff(width, height, data, others=(), compression=1) -> bytes:
    """A TIFF file of 8-bit gray in one strip, or as other entries say."""
    entries = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [8]), 259: ("H", [compression]), 262: ("H", [1]),
        273: ("I", [8]), 277: ("H", [1]), 278: ("I", [height]), 279: ("I", [len(data)]), **dict(others),
    }  # fmt: skip
    return tiff(entries, data)


def tiff_of_strips(strips, width=16, height=8) -> bytes:
    """A TIFF file that names its only row of pixels many times."""
    return gray_tiff(width, height, bytes(width * height), {273: ("I", [8] * strips), 278: ("I", [1])})


def bmp_of_runs(width, height) -> bytes:
    """A BMP file of 8-bit gray whose rows each end behind their first pixel."""
    rows = b"\x01\0\0\0" * height + b"\0\x01"
    header = struct.pack("<IIIHHIIIIII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = bytes(1024)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows
