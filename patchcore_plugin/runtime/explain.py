"""The reasons of a verdict: for each anomalous patch of an image, the nearest normal patch."""

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
    from patchcore_plugin.memory_bank import EnsembleBank, MemoryBank
    from patchcore_plugin.runtime.prediction import Outcome, Prediction
    from patchcore_plugin.scoring.regions import Region

MAX_REASONS = 16
"""Largest number of reasons; the regions of highest peak have one."""

_SEARCH_WIDTH_FACTOR = 8  # a few patches are searched for, so the search may be wider than for a score
_CROP_SHARE = 4  # the shorter side of a picture, in sides of a crop
_CROP_SIDE = 224  # pixels
_MARGIN, _LINE_WIDTH = 8, 2  # pixels


@dataclass(frozen=True)
class NormalPatch:
    """The bank vector nearest to a patch.

    Attributes:
        vector: Number of the vector in the bank.
        distance: Distance from the patch, in feature units.
        image: Name (folder/file) of the training image that the vector comes from; None where the bundle does not say.
        row: Row in the patch grid of that image; None where the bundle does not say.
        column: Column in the patch grid of that image; None where the bundle does not say.
        box: Place in that image, in whole pixels of the network's input, after resize and crop; None where the bundle does
            not say.
        crop: Surroundings in that image (224, 224, 3), u8, RGB, with the box drawn; None without thumbnails.
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
    """An anomalous patch of an image, and the nearest normal patch.

    Attributes:
        region: Region whose highest point lies in the patch; None for the farthest patch of an image without regions.
        row: Row in the patch grid.
        column: Column in the patch grid.
        box: Place of the patch, in whole pixels of the image.
        nearest: The nearest normal patch.
        crop: Surroundings (224, 224, 3), u8, RGB, with the box drawn; as large a part of the image as the normal patch's.
    """

    region: Region | None
    row: int
    column: int
    box: Box
    nearest: NormalPatch
    crop: NDArray[np.uint8] = field(repr=False)


def explain(outcome: Outcome, bank: MemoryBank | EnsembleBank, origins: Origins | None) -> list[Reason]:
    """Find the nearest normal patch of each of an image's regions, or, without a region, of its farthest patch.

    Args:
        outcome: Pixels, embedding and prediction of the image.
        bank: Memory bank that the prediction was made with.
        origins: Where the bank's vectors come from; None if unknown.

    Returns:
        A reason for each region, the highest peak first, at most :data:`MAX_REASONS`.
    """
    pixels, embedding, prediction = outcome.pixels, outcome.embedding, outcome.prediction
    preprocessing, grid = prediction.manifest.preprocessing, embedding.shape[:2]
    seen = preprocessing.seen(prediction.size)
    regions, places = _peaks(prediction)
    rows, columns = np.array(places).T
    distances, vectors = bank.search_again(embedding[rows, columns], _SEARCH_WIDTH_FACTOR)
    reasons = []
    for region, (row, column), distance, vector in zip(regions, places, distances.tolist(), vectors.tolist(), strict=True):
        box = seen.cell(row, column, grid).rounded()
        nearest = _normal_patch(vector, distance, origins, grid, preprocessing)
        reasons.append(Reason(region, row, column, box, nearest, _crop(pixels, box, seen)))
    return reasons


def _peaks(prediction: Prediction) -> tuple[Sequence[Region | None], list[tuple[int, int]]]:
    """The regions, in pixels of the image, and row and column of the patch under the highest point of each."""
    patches, values = prediction.patch_distances, prediction.anomaly_map
    if not prediction.regions:
        row, column = np.unravel_index(patches.argmax(), patches.shape)
        return [None], [(int(row), int(column))]
    places = []
    for region in prediction.map_regions[:MAX_REASONS]:
        part = values[region.top : region.top + region.height, region.left : region.left + region.width]
        y, x = np.argwhere(part == np.float32(region.peak))[0] + (region.top, region.left)
        places.append((int(y) * patches.shape[0] // values.shape[0], int(x) * patches.shape[1] // values.shape[1]))
    return prediction.regions[:MAX_REASONS], places


def _normal_patch(
    vector: int, distance: float, origins: Origins | None, grid: tuple[int, int], preprocessing: Preprocessing
) -> NormalPatch:
    if origins is None:
        return NormalPatch(vector, distance)
    number, row, column = map(int, origins.patches[vector])
    box = _whole(preprocessing.size).cell(row, column, grid).rounded()
    crop = None
    if origins.thumbnails is not None:
        thumbnail = origins.thumbnails[number]
        whole = _whole(thumbnail.shape[:2])
        crop = _crop(thumbnail, whole.cell(row, column, grid).rounded(), whole)
    return NormalPatch(vector, distance, origins.images[number], row, column, box, crop)


def _whole(size: tuple[int, int]) -> Box:
    """The box of a whole picture of a height and width."""
    return Box(0, 0, size[1], size[0])


def _crop(picture: NDArray[np.uint8], box: Box, seen: Box) -> NDArray[np.uint8]:
    """Cut out the surroundings of a box, within the part of a picture that the network saw, and draw the box.

    The share of that part is the same in every picture, so that crops of two pictures can be compared.
    """
    side = max(min(seen.width, seen.height) / _CROP_SHARE, box.width, box.height)
    left = min(max(box.left + box.width / 2 - side / 2, seen.left), max(seen.left, seen.left + seen.width - side))
    top = min(max(box.top + box.height / 2 - side / 2, seen.top), max(seen.top, seen.top + seen.height - side))
    part = (left, top, min(left + side, picture.shape[1]), min(top + side, picture.shape[0]))
    crop = Image.fromarray(picture).resize((_CROP_SIDE, _CROP_SIDE), Image.Resampling.BICUBIC, part)
    factor = _CROP_SIDE / side
    drawn = Box((box.left - left) * factor, (box.top - top) * factor, box.width * factor, box.height * factor)
    ImageDraw.Draw(crop).rectangle(drawn.corners, outline="red", width=_LINE_WIDTH)
    return np.asarray(crop)


def draw(reasons: Sequence[Reason]) -> Image.Image:
    """Draw a line for each reason: the surroundings of the anomalous patch, and on its right of the nearest normal patch."""
    step = _CROP_SIDE + _MARGIN
    pairs = any(reason.nearest.crop is not None for reason in reasons)
    sheet = Image.new("RGB", (step * (1 + pairs) + _MARGIN, step * len(reasons) + _MARGIN), "white")
    for line, reason in enumerate(reasons):
        for place, crop in enumerate((reason.crop, reason.nearest.crop)):
            if crop is not None:
                sheet.paste(Image.fromarray(crop), (_MARGIN + place * step, _MARGIN + line * step))
    return sheet
