"""Pictures that this package draws, such as heatmaps: PNG files with a mark, so that none is ever scored as a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

_KEYWORD, _PROGRAM = "Software", "patchcore-plugin"
_HEAD_BYTES = 256  # Pillow writes texts before the pixels


def save_drawing(picture: Image.Image, path: Path) -> None:
    """Write a picture as a PNG file whose text ``Software`` names this package.

    Raises:
        OSError: If the file cannot be written.
    """
    texts = PngInfo()
    texts.add_text(_KEYWORD, _PROGRAM)
    picture.save(path, "PNG", pnginfo=texts, compress_level=1)  # in less than half of the time, a fifth larger


def is_drawing(path: Path) -> bool:
    """Whether a file is one that :func:`save_drawing` wrote, wherever it lies now; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return f"tEXt{_KEYWORD}\0{_PROGRAM}".encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False
