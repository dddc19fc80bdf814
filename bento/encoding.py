"""Pictures as bytes and text."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_png(picture: Image.Image) -> bytes:
    """The PNG file of a picture."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)  # a tenth of the default level's time, for a slightly larger file
    return stream.getvalue()


def to_base64_png(picture: Image.Image) -> str:
    """The PNG file of a picture, as text for JSON."""
    return base64.b64encode(to_png(picture)).decode()


def to_gray16(values: NDArray[np.float32]) -> Image.Image:
    """Values (H, W) in [0, 1] as a 16-bit gray picture; values outside are clipped."""
    return Image.fromarray((np.clip(values, 0, 1) * 65535).round().astype(np.uint16))
