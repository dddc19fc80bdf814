"""The steps from an RGB image to the backbone's input, as a part of the OpenVINO network.

They are inside the network, so that a bundle's images are resized and normalized the same wherever they are scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from patchcore_plugin.runtime.network import INPUT, MASK, NORMALIZED, PLACE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Preprocessing

_BAND = 16  # rows of the result that one matrix product computes, from the image's rows that they depend on


def with_preprocessing(network: ov.Model, recipe: Preprocessing) -> ov.Model:
    """Put the steps from an image to the backbone's input before a network.

    Args:
        network: Model with one input, (B, 3, h, w) float32, normalized.
        recipe: The steps.

    Returns:
        Model with the input ``images`` (B, H, W, 3), u8, RGB, of any size. Where the recipe has tiles, two further inputs
        tell which one to embed; see :func:`patchcore_plugin.runtime.network.network_inputs`. The resize is equal to that of
        training, bilinear and antialiased, within rounding. It works by matrix products, whose weights are computed in the
        graph from the size of the image. OpenVINO's own antialiased resize works value by value and is many times slower.
    """
    images = _input([-1, -1, -1, 3], np.uint8, INPUT)
    inputs, shown, base, mask = [images], images, np.int32([0]), None
    (top, left), (height, width) = recipe.offset, recipe.network_size
    down, across = ops.split(ops.shape_of(images, "i32"), np.int64(0), 4).outputs()[1:3]
    if recipe.tiles is None:
        rows, columns = _positions(top, height, top + height - 1), _positions(left, width, left + width - 1)
        if recipe.region is not None:
            mask = np.float32(recipe.region.pixels[None, None])
    else:
        place, mask = _input([2], np.int32, PLACE), _input([1, 1, height, width], np.float32, MASK)
        inputs += [place, mask]
        # Beyond the input, a tile repeats its last pixels, which the mask hides.
        first = ops.split(ops.add(place, np.int32([top, left])), np.int64(0), 2).outputs()
        rows = _positions(first[0], height, top + recipe.size[0] - 1)
        columns = _positions(first[1], width, left + recipe.size[1] - 1)
        base, taken = _source(first[1], across, recipe.resize[1], -(-width // _BAND) * _BAND, slack=1)
        shown = ops.slice(images, base, ops.add(base, taken), np.int32([1]), np.int32([2]))
    # (B, H, W, 3) -> (B, h, W, 3) -> (B, W, 3, h) -> (B, w, 3, h) -> (B, 3, h, w)
    lines = _resized(ops.reshape(shown, np.int64([0, 0, -1]), True), rows, height, down, recipe.resize[0], np.int32([0]))
    turned = ops.transpose(ops.reshape(lines, np.int64([0, 0, -1, 3]), True), np.int64([0, 2, 3, 1]))
    flat = ops.reshape(turned, np.int64([0, 0, -1]), True)
    both = _resized(flat, columns, width, across, recipe.resize[1], base)
    resized = ops.transpose(ops.reshape(both, np.int64([0, 0, 3, -1]), True), np.int64([0, 2, 3, 1]))
    mean = np.float32(recipe.mean).reshape(1, 3, 1, 1)
    factor = np.float32(1 / (255 * np.float32(recipe.std).reshape(1, 3, 1, 1)))
    if mask is not None:
        factor = ops.multiply(mask, factor) if recipe.tiles else factor * mask
    normalized = ops.multiply(ops.subtract(resized, 255 * mean), factor, name=NORMALIZED)
    network.inputs[0].replace(normalized.output(0))
    return ov.Model(network.outputs, inputs, "features")


def _input(shape: list[int], dtype: type, name: str) -> ov.Node:
    node = ops.parameter(shape, dtype, name=name)
    node.output(0).get_tensor().set_names({name})
    return node


def _positions(first: ov.Node | int, count: int, last: int) -> ov.Node | NDArray[np.int32]:
    """Positions (bands, 16, 1) of the result from ``first`` on, ``count`` of them or a few more, none above ``last``."""
    steps = np.arange(-(-count // _BAND) * _BAND, dtype=np.int32)
    if isinstance(first, int):
        return np.minimum(first + steps, last).reshape(-1, _BAND, 1)
    return ops.reshape(ops.minimum(ops.add(first, steps), np.int32(last)), np.int64([-1, _BAND, 1]), False)


def _source(first: ov.Node, pixels: ov.Node, size: int, count: int, slack: int = 0) -> tuple[ov.Node, ov.Node]:
    """First pixel, and number of pixels, on which ``count`` positions of the result from ``first`` on depend.

    Units are those of :func:`_resized`. The number is the same whatever the first position.
    """
    reach = ops.multiply(ops.maximum(pixels, np.int32(size)), np.int32(2))
    unit = np.int32(2 * size)
    spread = ops.add(ops.multiply(pixels, np.int32(2 * (count - 1))), ops.multiply(reach, np.int32(2)))
    taken = ops.minimum(ops.add(ops.divide(spread, unit), np.int32(2 + slack)), pixels)
    center = ops.multiply(ops.add(ops.multiply(first, np.int32(2)), np.int32(1)), pixels)
    lowest = ops.subtract(center, ops.add(reach, np.int32(size)))
    start = ops.minimum(ops.divide(ops.maximum(lowest, np.int32(0)), unit), ops.subtract(pixels, taken))
    return start, taken


def _resized(
    values: ov.Node, positions: ov.Node | NDArray[np.int32], count: int, pixels: ov.Node, size: int, base: ov.Node
) -> ov.Node:
    """Resize the second axis of (B, P, F), bilinear and antialiased.

    The result at position i is a mean of the values at positions p, weighted by a triangle with its center at i. Positions
    are whole numbers: a pixel of the image measures 2 * size units, one of the result 2 * P. Floats would lose digits where
    a network computes in bfloat16.

    Args:
        values: The values, or those from the image's pixel ``base`` on.
        positions: Positions (bands, 16, 1) of the result.
        count: Number of positions to keep.
        pixels: Number P of the image's pixels along the axis.
        size: Number of all positions of the result.
        base: First pixel of ``values``.
    """
    positions = ops.convert(positions, "i32") if isinstance(positions, ov.Node) else ops.constant(positions)
    centers = ops.multiply(ops.add(ops.multiply(positions, np.int32(2)), np.int32(1)), pixels)
    reach = ops.multiply(ops.maximum(pixels, np.int32(size)), np.int32(2))
    # Every band takes the same number of the image's rows, from the first row on that its first triangle touches.
    first = ops.squeeze(ops.slice(positions, np.int64([0]), np.int64([1]), np.int64([1]), np.int64([1])), np.int64([1]))
    start, taken = _source(first, pixels, size, _BAND)
    rows = ops.add(start, ops.range(np.int32(0), ops.squeeze(taken, np.int64([0])), np.int32(1), "i32"))
    offsets = ops.unsqueeze(ops.add(ops.multiply(rows, np.int32(2 * size)), np.int32(size)), np.int64(1))
    weights = ops.convert(ops.maximum(ops.subtract(reach, ops.abs(ops.subtract(offsets, centers))), np.int32(0)), "f32")
    weights = ops.divide(weights, ops.reduce_sum(weights, np.int64([2]), True))
    values_of_bands = ops.convert(ops.gather(values, ops.subtract(rows, base), np.int64(1)), "f32")  # (B, bands, taken, F)
    resized_bands = ops.matmul(weights, values_of_bands, False, False)
    batch = ops.gather(ops.shape_of(values, "i32"), np.int64([0]), np.int64(0))
    shape = ops.concat([batch, np.int32([-(-count // _BAND) * _BAND, -1])], 0)
    resized = ops.reshape(resized_bands, shape, False)
    if count % _BAND == 0:
        return resized
    return ops.slice(resized, np.int64([0]), np.int64([count]), np.int64([1]), np.int64([1]))
