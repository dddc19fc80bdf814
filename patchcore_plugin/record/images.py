"""The stored images of a record: files in its folder ``images``, as they were sent."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from patchcore_plugin.record.errors import RecordError
from patchcore_plugin.record.ids import ID

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

CONTENT_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "bmp": "image/bmp",
    "tif": "image/tiff",
    "webp": "image/webp",
    "bin": "application/octet-stream",
}
"""Content type of a stored image by the ending of its file."""

_BEGINS = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpg"), (b"BM", "bmp"), (b"II", "tif"), (b"MM", "tif"), (b"RIFF", "webp"))
_HOUR = 3600


def image_type(content: bytes) -> str:
    """The ending for an image's file, by its first bytes."""
    return next((ending for begin, ending in _BEGINS if content.startswith(begin)), "bin")


def image_path(folder: Path, record: str, ending: str) -> Path:
    """Path of an answer's image. A folder holds a 256th of the images.

    Args:
        folder: Folder of the record.
        record: Id of the answer.
        ending: What :func:`image_type` found.

    Raises:
        RecordError: If the database tells of an image that no service has written.
    """
    if not ID.fullmatch(record) or ending not in CONTENT_TYPES:
        msg = f"There is no image {record!r} of the kind {ending!r}."
        raise RecordError(msg)
    return folder / "images" / record[-2:] / f"{record}.{ending}"


def write_image(path: Path, content: bytes) -> None:
    """Write an image. Nobody reads the file before its answer is in the database, so it may grow in its place.

    Raises:
        OSError: If it cannot be written; nothing is left of it then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(content)
    except OSError:
        remove_image(path)
        raise


def read_verified(path: Path, sha256: str) -> bytes | None:
    """The bytes of an image; None if the file is missing, or is not what was sent, as after a failure of the current."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def remove_image(path: Path) -> None:
    """Remove an image; on Windows one that is just being read stays, until :func:`remove_unknown`."""
    with suppress(OSError):
        path.unlink()


def remove_unknown(folder: Path, known: Container[str]) -> None:
    """Remove images that no answer has: their process was killed before it wrote the answer, or could remove the file.

    Args:
        folder: Folder of the record.
        known: Ids of the answers with an image.
    """
    before = time.time() - _HOUR  # younger ones may be those that another service is writing
    for path in folder.glob("images/*/*.*"):
        with suppress(FileNotFoundError):  # the other service has removed it
            if ID.fullmatch(path.stem) and path.stem not in known and path.stat().st_mtime < before:
                remove_image(path)
