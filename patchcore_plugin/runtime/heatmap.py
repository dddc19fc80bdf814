"""Heatmaps: an anomaly map laid over its image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Preprocessing

# Of a map whose threshold is 0.5: where color begins, where it is full, and how much of it covers the image.
COLOR_FROM, COLOR_FULL, OPACITY = 0.45, 0.85, 0.75


def overlay(image: NDArray[np.uint8], values: NDArray[np.float32], preprocessing: Preprocessing) -> Image.Image:
    """Lay an anomaly map over the image it belongs to.

    Args:
        image: RGB image (H, W, 3), u8, as it was given to the runtime.
        values: Normalised anomaly map (h, w) in [0, 1], over the part of the image that the model saw.
        preprocessing: The model's resize and crop, which say which part that is.

    Returns:
        The image in its own size: plain where normal or cropped away, yellow from the pixel threshold on, red far above it.
    """
    part = preprocessing.seen(image.shape[:2])
    width, height = max(1, round(part.width)), max(1, round(part.height))
    above = np.clip((values - COLOR_FROM) / (COLOR_FULL - COLOR_FROM), 0, 1)
    grey = Image.fromarray((above * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    picture = Image.fromarray(image)
    opacity = grey.point(lambda value: int(value * OPACITY))
    picture.paste(ImageOps.colorize(grey, "yellow", "red"), (round(part.left), round(part.top)), opacity)
    return picture
