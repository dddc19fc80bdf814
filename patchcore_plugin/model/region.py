"""The argument ``region_of_interest``: from a mask image or shapes to the pixels that are inspected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from torch.nn import functional as F
from torchvision.transforms.v2 import Resize

from patchcore_plugin.bundle import RegionOfInterest
from patchcore_plugin.errors import UsageError
from patchcore_plugin.images import read_image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

Shapes = list[dict[str, Any]]

_EXAMPLE = "[{rectangle: [0.1, 0.1, 0.9, 0.9]}, {polygon: [[0.7, 0.8], [0.9, 0.8], [0.9, 0.9]], ignore: true}]"
_OVERSAMPLING = 4  # pixels of a drawn mask for each pixel of the resized image, along each axis
_WHITE = 128  # gray level from which on a mask's pixel is inspected


def check_region(value: Any) -> str | Shapes | None:
    """The argument as plain data: the path of a mask image, or shapes.

    Raises:
        UsageError: Unless ``value`` is None, a path, or a list of shapes with coordinates from 0 to 1.
    """
    if value is None or isinstance(value, str | Path):
        return value and str(value)
    if not isinstance(value, Sequence) or not value:
        msg = f"region_of_interest must be a mask image's path, or a list of shapes such as {_EXAMPLE}, got {short(value)}."
        raise UsageError(msg)
    return [_check_shape(shape) for shape in value]


def _check_shape(shape: Any) -> dict[str, Any]:
    content = dict(shape) if isinstance(shape, Mapping) else {}
    ignore = content.pop("ignore", False)
    if len(content) == 1 and isinstance(ignore, bool):
        kind, numbers = next(iter(content.items()))
        if kind == "rectangle" and _are_fractions(numbers, 4) and numbers[0] < numbers[2] and numbers[1] < numbers[3]:
            return {"rectangle": [float(number) for number in numbers], "ignore": ignore}
        is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
        if kind == "polygon" and is_list and len(numbers) > 2 and all(_are_fractions(corner, 2) for corner in numbers):
            return {"polygon": [[float(number) for number in corner] for corner in numbers], "ignore": ignore}
    msg = (
        "A shape of region_of_interest is a rectangle [left, top, right, bottom] or a polygon of at least three corners "
        "[x, y], in shares of the image's width and height from 0 to 1; with `ignore: true` it is where not to look, as in "
        f"{_EXAMPLE}. Got {short(shape)}."
    )
    raise UsageError(msg)


def _are_fractions(values: Any, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1 for value in values)
    )


def mask_size(region: str | Shapes | None) -> tuple[int, int] | None:
    """Width and height of the mask image; None for shapes, which fit any image.

    Raises:
        UsageError: If there is no such file.
        ImageError: If it is no image.
    """
    if not isinstance(region, str):
        return None
    height, width, _ = _read(region).shape
    return width, height


def _read(path: str) -> NDArray[np.uint8]:
    try:
        return read_image(Path(path))
    except OSError as error:
        msg = f"The mask image of region_of_interest cannot be read: {path}: {error.strerror or error}"
        raise UsageError(f"{msg}. Its path counts from {Path.cwd()}.") from error


def build_region(region: str | Shapes, transform: nn.Module | None) -> RegionOfInterest:
    """Find the pixels of the network's input that are inspected.

    A pixel is inspected if all that the resize makes it of lies inside, for images that are at least as large as the
    network's input. So nothing outside changes a score.

    Args:
        region: What :func:`check_region` gives.
        transform: The model's pre-processing.

    Raises:
        UsageError: If the pre-processing has no resize to a fixed height and width, if nothing is left to inspect, or if
            there is no such mask image.
        ImageError: If the mask image is none.
    """
    resize = extract_transforms_by_type(transform, Resize)
    if not resize or not isinstance(resize[-1].size, Sequence) or len(resize[-1].size) != 2:
        msg = "region_of_interest needs a pre-processor that resizes images to a fixed height and width."
        raise UsageError(msg)
    least = tuple(_OVERSAMPLING * side for side in resize[-1].size)
    drawn = _read_mask(region, least) if isinstance(region, str) else _draw(region, least)
    outside = F.max_pool2d(torch.from_numpy(~drawn).float()[None], 3, stride=1, padding=1)  # what a pixel touches counts
    reached = transform(outside.expand(3, -1, -1)[None]) - transform(torch.zeros(1, 3, *outside.shape[-2:]))
    inside = reached[0].abs().amax(0) < 1e-5
    if not inside.any():
        msg = f"region_of_interest leaves nothing to inspect: {short(region)}. In a mask image, white is inspected."
        raise UsageError(msg)
    return RegionOfInterest.of(inside.numpy())


def check_patches(region: RegionOfInterest, grid: tuple[int, int]) -> NDArray[np.int64]:
    """Numbers of the inspected patches of a grid (h, w), counted row by row.

    Raises:
        UsageError: If there is none.
    """
    inspected = region.patches(grid)
    if not len(inspected):
        msg = "region_of_interest has the center of no patch: make it larger, or the image_size."
        raise UsageError(msg)
    return inspected


def _read_mask(path: str, least: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask, each pixel repeated until it is at least as large as ``least``."""
    inside = _read(path).mean(axis=2) >= _WHITE
    down, across = (-(-wanted // side) for wanted, side in zip(least, inside.shape, strict=True))
    return inside.repeat(down, axis=0).repeat(across, axis=1)


def _draw(shapes: Shapes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw shapes one over the other; the rest is inspected if the first shape is one to ignore.

    A pixel is inspected if its four corners are.
    """
    ys, xs = (np.clip(np.linspace(0, 1, side + 1), 1e-9, 1 - 1e-9) for side in size)  # edges of the image count as inside
    corners = np.full((len(ys), len(xs)), shapes[0]["ignore"])
    for shape in shapes:
        corners[_within(shape, ys, xs)] = not shape["ignore"]
    return corners[:-1, :-1] & corners[1:, :-1] & corners[:-1, 1:] & corners[1:, 1:]


def _within(shape: dict[str, Any], ys: NDArray[np.float64], xs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each point (len(ys), len(xs)) lies in a shape: an odd number of its sides lie right of the point."""
    left, top, right, bottom = shape.get("rectangle", (0, 0, 0, 0))
    polygon = shape.get("polygon") or [(left, top), (right, top), (right, bottom), (left, bottom)]
    within = np.zeros((len(ys), len(xs)), bool)
    for (x, y), (next_x, next_y) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        rows = np.flatnonzero((ys < y) != (ys < next_y))
        crossing = x + (ys[rows] - y) / (next_y - y or 1) * (next_x - x)
        within[rows] ^= xs < crossing[:, None]
    return within
