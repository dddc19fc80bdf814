"""Windows pasted into normal images: something to find where no defect is at hand (as in CutPaste, Li et al. 2021)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PASTE_SIDE = 0.04, 0.15
"""Least and largest side of a pasted window, as a share of the image's."""

PASTE_GAIN = 0.7, 1.3
"""Least and largest factor of a pasted window's intensity."""

PASTED_IMAGES = 16
"""Number of images with a pasted window by which a search is judged, beside the normal ones."""

_MIN_SIDE = 4  # pixels of a window


def paste_windows(
    images: Sequence[NDArray[np.uint8]], inspected: NDArray[np.bool_] | None = None
) -> list[NDArray[np.uint8]]:
    """Copies of images (H, W, 3), the first :data:`PASTED_IMAGES` of them, each with a window of the image before it.

    The windows' centers lie where ``inspected`` says; see :func:`draw_window`.
    """
    some = images[:PASTED_IMAGES]
    return [paste(image, images[number - 1], number, inspected) for number, image in enumerate(some)]


def paste(
    image: NDArray[np.uint8], source: NDArray[np.uint8], seed: int, inspected: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Paste a window of another image, turned by a multiple of 90 degrees, and brighter or darker.

    Args:
        image: Normal image (H, W, 3), RGB.
        source: Image (h, w, 3) that the window is cut out of.
        seed: Seed of place, size and strength.
        inspected: Where the window's center may lie, as in :func:`draw_window`.

    Returns:
        Image (H, W, 3) with the window.
    """
    rng = random.Random(seed)  # noqa: S311
    changed, window = image.copy(), draw_window(image, rng, PASTE_SIDE, inspected)
    pixels, turned = changed[window], np.rot90(source, rng.randrange(4))
    height, width = (min(sides) for sides in zip(pixels.shape[:2], turned.shape[:2], strict=True))
    top, left = rng.randint(0, turned.shape[0] - height), rng.randint(0, turned.shape[1] - width)
    cut = turned[top : top + height, left : left + width] * rng.uniform(*PASTE_GAIN)
    pixels[:height, :width] = cut.clip(0, 255).round()
    return changed


def draw_window(
    image: NDArray[np.uint8],
    rng: random.Random,
    side: tuple[float, float],
    inspected: NDArray[np.bool_] | None = None,
) -> tuple[slice, slice]:
    """Rows and columns of a random window of an image (H, W, 3).

    Args:
        image: The image.
        rng: Draws place and size; height and width apart.
        side: Least and largest side, as a share of the image's.
        inspected: Cells (h, w) of a grid over the image, one of which holds the window's center, but for a window at an
            edge of the image. None takes any place.
    """
    cell = None
    if inspected is not None:
        cells = np.argwhere(inspected)
        cell = cells[rng.randrange(len(cells))]
    slices = []
    for axis, length in enumerate(image.shape[:2]):
        extent = min(length, max(_MIN_SIDE, round(length * rng.uniform(*side))))
        if cell is None:
            start = rng.randint(0, length - extent)
        else:
            center = length * (cell[axis] + 0.5) / inspected.shape[axis]
            start = min(max(0, round(center - extent / 2)), length - extent)
        slices.append(slice(start, start + extent))
    return slices[0], slices[1]
