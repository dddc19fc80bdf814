"""The steps from an RGB image to the backbone's input, as a part of the OpenVINO network.

They are inside the network, so that a bundle's images are resized and normalized the same wherever they are scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from patchcore_plugin.runtime.network import INPUT, NORMALIZED

if TYPE_CHECKING:
    from patchcore_plugin.bundle import Preprocessing

_BAND_ROWS = 16  # rows of the result that one matrix product computes, from the image's rows that they depend on


def with_preprocessing(network: ov.Model, recipe: Preprocessing) -> ov.Model:
    """Put the steps from an image to the backbone's input before a network.

    Args:
        network: Model with one input, (B, 3, h, w) float32, normalized.
        recipe: The steps.

    Returns:
        Model with the input ``images`` (B, H, W, 3), u8, RGB, of any size. Its resize is equal to that of training,
        bilinear and antialiased, within rounding. It works by matrix products, whose weights are computed in the graph from
        the size of the image. OpenVINO's own antialiased resize works value by value and is many times slower.
    """
    images = ops.parameter([-1, -1, -1, 3], np.uint8, name=INPUT)
    images.output(0).get_tensor().set_names({INPUT})
    (top, left), (height, width) = recipe.offset, recipe.size
    # (B, H, W, 3) -> (B, h, W, 3) -> (B, W, 3, h) -> (B, w, 3, h) -> (B, 3, h, w)
    down = _resized(ops.reshape(images, np.int64([0, 0, -1]), True), recipe.resize[0], top, height)
    turned = ops.transpose(ops.reshape(down, np.int64([0, 0, -1, 3]), True), np.int64([0, 2, 3, 1]))
    across = _resized(ops.reshape(turned, np.int64([0, 0, -1]), True), recipe.resize[1], left, width)
    resized = ops.transpose(ops.reshape(across, np.int64([0, 0, 3, -1]), True), np.int64([0, 2, 3, 1]))
    mean = np.float32(recipe.mean).reshape(1, 3, 1, 1)
    std = np.float32(recipe.std).reshape(1, 3, 1, 1)
    factor = 1 / (255 * std)
    if recipe.region is not None:
        factor = factor * recipe.region.pixels[None, None]
    normalized = ops.multiply(ops.subtract(resized, 255 * mean), factor.astype(np.float32), name=NORMALIZED)
    network.inputs[0].replace(normalized.output(0))
    return ov.Model(network.outputs, [images], "features")


def _resized(values: ov.Node, size: int, first: int, count: int) -> ov.Node:
    """Resize the second axis of (B, P, F) to ``size``, bilinear and antialiased; keep ``count`` positions from ``first`` on.

    The result at position i is a mean of the values at positions p, weighted by a triangle with its center at i. Positions
    are whole numbers: a pixel of the image measures 2 * size units, one of the result 2 * P. Floats would lose digits where
    a network computes in bfloat16.
    """
    batch, pixels, _ = ops.split(ops.shape_of(values, "i32"), np.int64(0), 3).outputs()
    bands = -(-count // _BAND_ROWS)
    kept = np.minimum(np.arange(first, first + bands * _BAND_ROWS), first + count - 1).reshape(bands, _BAND_ROWS, 1)
    centers = ops.multiply((2 * kept + 1).astype(np.int32), pixels)
    reach = ops.multiply(ops.maximum(pixels, np.int32(size)), np.int32(2))
    # Every band takes the same number of the image's rows, from the first row on that its first triangle touches.
    unit = np.int32(2 * size)
    spread = ops.add(ops.multiply(pixels, np.int32(2 * (_BAND_ROWS - 1))), ops.multiply(reach, np.int32(2)))
    taken = ops.minimum(ops.add(ops.divide(spread, unit), np.int32(2)), pixels)
    lowest = ops.subtract(ops.multiply((2 * kept[:, 0] + 1).astype(np.int32), pixels), ops.add(reach, np.int32(size)))
    start = ops.minimum(ops.divide(ops.maximum(lowest, np.int32(0)), unit), ops.subtract(pixels, taken))
    rows = ops.add(start, ops.range(np.int32(0), ops.squeeze(taken, np.int64([0])), np.int32(1), "i32"))
    positions = ops.unsqueeze(ops.add(ops.multiply(rows, unit), np.int32(size)), np.int64(1))
    weights = ops.convert(ops.maximum(ops.subtract(reach, ops.abs(ops.subtract(positions, centers))), np.int32(0)), "f32")
    weights = ops.divide(weights, ops.reduce_sum(weights, np.int64([2]), True))
    values_of_bands = ops.convert(ops.gather(values, rows, np.int64(1)), "f32")  # (B, bands, taken, F)
    resized_bands = ops.matmul(weights, values_of_bands, False, False)
    shape = ops.concat([batch, np.int32([bands * _BAND_ROWS, -1])], 0)
    resized = ops.reshape(resized_bands, shape, False)
    if bands * _BAND_ROWS == count:
        return resized
    return ops.slice(resized, np.int64([0]), np.int64([count]), np.int64([1]), np.int64([1]))
