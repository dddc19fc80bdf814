"""Pictures as the bytes of image files."""

from __future__ import annotations

import io


def encoded(picture, form="PNG", **options) -> bytes:
    """The bytes of a picture's file, in one of Pillow's formats; options are those of Pillow."""
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()
