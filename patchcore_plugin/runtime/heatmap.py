"""Heatmaps: an anomaly map laid over its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Preprocessing

# values of a map whose threshold is 0.5
FIRST_COLORED_VALUE = 0.45
FULL_COLOR_VALUE = 0.85

OPACITY = 0.75
"""Share of the image that full color covers."""

SHADE = 0.4
"""Brightness of what is not inspected, as a share of the image's."""


def overlay(image: NDArray[np.uint8], values: NDArray[np.float32], preprocessing: Preprocessing) -> Image.Image:
    """Lay an anomaly map over its image.

    Args:
        image: RGB image (H, W, 3), u8, as it was given to the runtime.
        values: Anomaly map (h, w) for display, around [0, 1] with the threshold at 0.5, over the part of the image that the
            network saw.
        preprocessing: The model's resize and crop, which give that part.

    Returns:
        The image in its own size: plain where it is normal or was cropped away, yellow near the pixel threshold, red far
        above it, dark outside the region of interest.
    """
    part = preprocessing.seen(image.shape[:2]).rounded()
    color = np.clip((values - FIRST_COLORED_VALUE) / (FULL_COLOR_VALUE - FIRST_COLORED_VALUE), 0, 1)
    gray = Image.fromarray((color * 255).astype(np.uint8)).resize((part.width, part.height), Image.Resampling.BILINEAR)
    picture = Image.fromarray(image)
    if preprocessing.region is not None:
        outside = Image.fromarray(np.uint8(255) * ~preprocessing.region.pixels).resize(gray.size, Image.Resampling.NEAREST)
        dark = picture.crop(part.corners).point(lambda value: int(value * SHADE))
        picture.paste(dark, (part.left, part.top), outside)
    opacity = gray.point(lambda value: int(value * OPACITY))
    picture.paste(ImageOps.colorize(gray, "yellow", "red"), (part.left, part.top), opacity)
    return picture
