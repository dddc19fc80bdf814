"""Facts of image files: whether they can be read, size and depth, and what shows that two hold the same picture."""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from patchcore_plugin.cpu import cores
from patchcore_plugin.images import ImageError, decode_image

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.progress import Progress

_SIDE = 32  # of a thumbnail, in pixels

NEAR_DISTANCE = 0.04
"""Distance of two thumbnails at which their images are near copies, at most; they lie on the unit sphere."""

NEAR_SHARE = 0.3
"""The same, as a share of the median distance of an image to the nearest other one: parts may look alike."""

COMMON_SHARE = 0.9
"""Share of the images that must have a size or depth, for another one to be odd."""

_BLOCK = 1024  # images
_MODES = {
    "1": "black and white", "L": "gray, 8 bits", "P": "palette", "RGB": "color, 8 bits", "RGBA": "color with alpha, 8 bits",
    "LA": "gray with alpha, 8 bits", "CMYK": "CMYK", "F": "gray, float32", "I": "gray, 32 bits",
}  # fmt: skip


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image file.

    Attributes:
        path: Its path.
        error: Why it cannot be read; empty if it can. Then nothing below is known.
        size: Height and width, in pixels.
        kind: Channels and depth, in words.
        values: Least and largest value of an image deeper than 8 bits; None for 8 bits.
        file_hash: SHA-256 of the file.
        pixel_hash: SHA-256 of the decoded pixels and their shape.
        thumbnail: Small gray picture (1024,), float32, of mean 0 and length 1: free of brightness and contrast.
    """

    path: Path
    error: str = ""
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    values: tuple[float, float] | None = None
    file_hash: str = ""
    pixel_hash: str = ""
    thumbnail: NDArray[np.float32] = field(default_factory=lambda: np.zeros(_SIDE * _SIDE, np.float32), repr=False)


def read_all_facts(paths: Sequence[Path], step: str, progress: Progress) -> list[ImageFacts]:
    """Facts of image files in their order, read in several threads.

    Args:
        paths: The files.
        step: Name of the step that progress is told of.
        progress: Called with each file.
    """
    facts = []
    progress(step, 0, len(paths))
    with ThreadPoolExecutor(cores()) as pool:
        for image in pool.map(read_facts, paths):
            facts.append(image)
            progress(step, len(facts), len(paths))
    return facts


def read_facts(path: Path) -> ImageFacts:
    """Facts of one image file; one that cannot be read has the reason in ``error``."""
    try:
        file_hash = hashlib.sha256(path.read_bytes()).hexdigest()
        pixels = decode_image(path)
        with Image.open(path) as image:
            mode = image.mode
    except ImageError as error:
        return ImageFacts(path, error.reason)
    except OSError as error:
        return ImageFacts(path, error.strerror or str(error))
    values = None
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            return ImageFacts(path, "a value is NaN or infinite")
        values = float(pixels.min()), float(pixels.max())
    return ImageFacts(
        path=path,
        size=(pixels.shape[0], pixels.shape[1]),
        kind=_kind(mode, pixels),
        values=values,
        file_hash=file_hash,
        pixel_hash=hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode() + np.ascontiguousarray(pixels).data).hexdigest(),
        thumbnail=_thumbnail(pixels),
    )


def _kind(mode: str, pixels: NDArray) -> str:
    """Channels and depth, in words, of an image with a mode of Pillow; Pillow has none for color of 16 bits."""
    if pixels.ndim == 3 and pixels.dtype != np.uint8:
        return f"color, {pixels.dtype}"
    return "gray, 16 bits" if mode.startswith("I;16") else _MODES.get(mode, mode)


def find_copies(images: Sequence[ImageFacts], others: Sequence[ImageFacts] | None = None) -> dict[int, tuple[int, str]]:
    """Find images that hold the same picture as another: one before them, or any of other images.

    Args:
        images: Facts of readable images.
        others: Facts of readable images to compare with; None compares each image with those before it.

    Returns:
        For the number of each image that has a like, the like's number, and how they are alike, in words.
    """
    found: dict[int, tuple[int, str]] = {}
    for name, words in (("file_hash", "the same file"), ("pixel_hash", "the same pixels")):
        first: dict[str, int] = {}
        for number, image in enumerate(others or ()):
            first.setdefault(getattr(image, name), number)
        for number, image in enumerate(images):
            value = getattr(image, name)
            if value in first:
                found.setdefault(number, (first[value], words))
            elif others is None:
                first[value] = number
    for number, like in _near_copies(images, others, found):
        found.setdefault(number, (like, "nearly the same picture"))
    return found


def _near_copies(
    images: Sequence[ImageFacts], others: Sequence[ImageFacts] | None, exact: dict[int, tuple[int, str]]
) -> Iterator[tuple[int, int]]:
    """Pairs of an image and its near copy; a scale of distances is taken from the images that are no exact copies."""
    own = np.stack([image.thumbnail for image in images]) if images else np.zeros((0, _SIDE * _SIDE), np.float32)
    kept = np.array([number for number in range(len(images)) if others is not None or number not in exact], int)
    if len(kept) < 2 or (others is not None and not others):
        return
    kept_rows = own[kept]
    usual = _nearest(kept_rows, kept_rows, "others")[1]
    usual = usual[usual > 0]
    within = min(NEAR_DISTANCE, NEAR_SHARE * float(np.median(usual))) if len(usual) else 0.0
    if others is None:
        likes, distances = _nearest(kept_rows, kept_rows, "before")
        likes = kept[likes]
    else:
        likes, distances = _nearest(own, np.stack([image.thumbnail for image in others]), "all")
    yield from ((int(kept[number]), int(likes[number])) for number in np.flatnonzero(distances <= within))


def _nearest(
    rows: NDArray[np.float32], candidates: NDArray[np.float32], among: Literal["all", "others", "before"]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Number and distance of the thumbnail nearest to each row: among all, those but the row itself, or those before it."""
    likes, distances = np.zeros(len(rows), int), np.zeros(len(rows), np.float32)
    columns = np.arange(len(candidates))
    for start in range(0, len(rows), _BLOCK):
        part = slice(start, start + _BLOCK)
        squared = 2 - 2 * rows[part] @ candidates.T
        own = np.arange(len(rows))[part, None]
        if among != "all":
            squared[columns == own if among == "others" else columns >= own] = np.inf
        likes[part] = squared.argmin(1)
        distances[part] = np.sqrt(np.maximum(squared.min(1), 0))
    return likes, distances


def find_odd(values: Sequence[Hashable]) -> tuple[set[int], Hashable | None]:
    """Numbers of the values that differ from the common one, and the common one; None where there is none."""
    if not values:
        return set(), None
    common, count = Counter(values).most_common(1)[0]
    if count < COMMON_SHARE * len(values):
        return set(), None
    return {number for number, value in enumerate(values) if value != common}, common


def _thumbnail(pixels: NDArray) -> NDArray[np.float32]:
    gray = pixels.astype(np.float32)
    gray = Image.fromarray(gray.mean(axis=2) if gray.ndim == 3 else gray)
    small = np.asarray(gray.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32).ravel()
    small = small - small.mean()
    return small / max(float(np.linalg.norm(small)), np.finfo(np.float32).tiny)
