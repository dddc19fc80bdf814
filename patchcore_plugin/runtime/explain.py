"""Why a verdict: the normal patches that the anomalous ones of an image were compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from patchcore_plugin.bundle import Box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Preprocessing
    from patchcore_plugin.bundle.origins import Origins
    from patchcore_plugin.memory_bank import MemoryBank
    from patchcore_plugin.runtime.prediction import Prediction
    from patchcore_plugin.scoring.regions import Region

MAX_REASONS = 16
"""Regions that are explained, those of highest peak."""

SEARCH_WIDTH_FACTOR = 8  # a few patches are searched for, more widely than for a score
_CROP = 4  # a crop shows this part of the picture's shorter side
_SIDE = 224  # pixels of a crop
_MARGIN, _LINE = 8, 2


@dataclass(frozen=True)
class NormalPatch:
    """The bank vector nearest to a patch.

    Attributes:
        vector: Its number in the bank.
        distance: From the patch, in feature units.
        image: Name of the training image it comes from (folder/file); None where the bundle does not say.
        row: Its row in the image's patch grid; None where the bundle does not say.
        column: Its column.
        box: Its place, in pixels of the image as the network saw it, after resize and crop.
        crop: What is around it (224, 224, 3), u8, RGB, with its box drawn; None without thumbnails.
    """

    vector: int
    distance: float
    image: str | None = None
    row: int | None = None
    column: int | None = None
    box: Box | None = None
    crop: NDArray[np.uint8] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Reason:
    """A patch that is far from all normal ones, and the nearest of those.

    Attributes:
        region: The anomalous region that has its highest point in this patch; None where there is no region: then it is the
            image's most anomalous patch.
        row: The patch's row in the patch grid.
        column: Its column.
        box: Its place, in pixels of the image.
        nearest: The normal patch.
        crop: What is around it (224, 224, 3), u8, RGB, with its box drawn, as large a part of the image as the other's.
    """

    region: Region | None
    row: int
    column: int
    box: Box
    nearest: NormalPatch
    crop: NDArray[np.uint8] = field(repr=False)


def explain(
    prediction: Prediction,
    pixels: NDArray[np.uint8],
    embedding: NDArray[np.float32],
    bank: MemoryBank,
    origins: Origins | None,
) -> list[Reason]:
    """Name the nearest normal patch of each of a prediction's regions, or of its most anomalous patch.

    Args:
        prediction: Answer for the image.
        pixels: The image (H, W, 3), u8, RGB.
        embedding: Its patch embeddings (h, w, D).
        bank: The memory bank.
        origins: Where the bank's vectors come from, if that is known.
    """
    recipe = prediction.manifest.preprocessing
    regions, places = _peaks(prediction)
    rows, columns = np.array(places).T
    distances, vectors = bank.search(embedding[rows, columns], 1, max(1, SEARCH_WIDTH_FACTOR * bank.width))
    grid = embedding.shape[:2]
    seen = recipe.seen(pixels.shape[:2])
    reasons = []
    for region, row, column, distance, vector in zip(
        regions, rows.tolist(), columns.tolist(), distances[:, 0].tolist(), vectors[:, 0].tolist(), strict=True
    ):
        box = _box(row, column, grid, seen)
        nearest = _normal(vector, distance, origins, grid, recipe)
        reasons.append(Reason(region, row, column, box, nearest, _crop(pixels, box, seen)))
    return reasons


def _peaks(prediction: Prediction) -> tuple[Sequence[Region | None], list[tuple[int, int]]]:
    """The regions, and the patch (row, column) under the highest point of each."""
    patches, values = prediction.patch_distances, prediction.anomaly_map
    if not prediction.regions:
        row, column = np.unravel_index(patches.argmax(), patches.shape)
        return [None], [(int(row), int(column))]
    places = []
    for region in prediction.map_regions[:MAX_REASONS]:  # in pixels of the map
        part = values[region.top : region.top + region.height, region.left : region.left + region.width]
        y, x = np.argwhere(part == np.float32(region.peak))[0] + (region.top, region.left)
        places.append((int(y) * patches.shape[0] // values.shape[0], int(x) * patches.shape[1] // values.shape[1]))
    return prediction.regions[:MAX_REASONS], places


def _normal(
    vector: int, distance: float, origins: Origins | None, grid: tuple[int, int], recipe: Preprocessing
) -> NormalPatch:
    if origins is None:
        return NormalPatch(vector, distance)
    number, row, column = map(int, origins.patches[vector])
    box = _box(row, column, grid, Box(0, 0, recipe.size[1], recipe.size[0]))
    crop = None
    if origins.thumbnails is not None:
        picture = origins.thumbnails[number]
        whole = Box(0, 0, picture.shape[1], picture.shape[0])
        crop = _crop(picture, _box(row, column, grid, whole), whole)
    return NormalPatch(vector, distance, origins.images[number], row, column, box, crop)


def _box(row: int, column: int, grid: tuple[int, int], seen: Box) -> Box:
    """Place of a patch in a picture, of which the grid covers ``seen``."""
    height, width = seen.height / grid[0], seen.width / grid[1]
    return Box(seen.left + column * width, seen.top + row * height, width, height).rounded()


def _crop(picture: NDArray[np.uint8], box: Box, seen: Box) -> NDArray[np.uint8]:
    """What is around a box, within the part of a picture that is seen; as large as the same part of any other picture."""
    left, top, width, height = seen
    side = max(min(width, height) / _CROP, box.width, box.height)
    x = min(max(box.left + box.width / 2 - side / 2, left), max(left, left + width - side))
    y = min(max(box.top + box.height / 2 - side / 2, top), max(top, top + height - side))
    factor = _SIDE / side
    part = Image.fromarray(picture).resize(
        (_SIDE, _SIDE), Image.Resampling.BICUBIC, (x, y, min(x + side, picture.shape[1]), min(y + side, picture.shape[0]))
    )
    upper_left = (box.left - x) * factor, (box.top - y) * factor
    lower_right = (box.left + box.width - x) * factor, (box.top + box.height - y) * factor
    ImageDraw.Draw(part).rectangle((*upper_left, *lower_right), outline="red", width=_LINE)
    return np.asarray(part)


def draw(reasons: Sequence[Reason]) -> Image.Image:
    """One line for each reason: what is around the anomalous patch, and around the nearest normal one, side by side."""
    step = _SIDE + _MARGIN
    pairs = any(reason.nearest.crop is not None for reason in reasons)
    sheet = Image.new("RGB", (step * (1 + pairs) + _MARGIN, step * len(reasons) + _MARGIN), "white")
    for line, reason in enumerate(reasons):
        for place, crop in enumerate((reason.crop, reason.nearest.crop)):
            if crop is not None:
                sheet.paste(Image.fromarray(crop), (_MARGIN + place * step, _MARGIN + line * step))
    return sheet
