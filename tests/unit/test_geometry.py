"""Where a pixel of the network's input lies in the image, and back: against torchvision's crop and by plain arithmetic."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import center_crop

from patchcore_plugin.bundle import Box, Preprocessing

sides = st.integers(1, 64)


@st.composite
def croppings(draw):
    height, width = resize = draw(st.tuples(sides, sides))
    crop = draw(st.none() | st.tuples(st.integers(1, height), st.integers(1, width)))
    return Preprocessing(resize=resize, crop=crop, mean=(0, 0, 0), std=(1, 1, 1))


@given(preprocessing=croppings())
def test_crop_is_torchvisions(preprocessing):
    height, width = preprocessing.resize
    numbers = torch.arange(height * width).reshape(1, height, width)
    expected = center_crop(numbers, list(preprocessing.size))[0].numpy()
    (top, left), (rows, columns) = preprocessing.offset, preprocessing.size
    np.testing.assert_array_equal(numbers[0, top : top + rows, left : left + columns].numpy(), expected)
    left, top, right, bottom = preprocessing.crop_box.corners
    np.testing.assert_array_equal(numbers[0, top:bottom, left:right].numpy(), expected)
    (above, below), (before, after) = preprocessing.margins
    padded = np.pad(expected, preprocessing.margins)
    assert padded.shape == (height, width)
    np.testing.assert_array_equal(padded[above : height - below, before : width - after], expected)


@given(preprocessing=croppings(), size=st.tuples(st.integers(1, 500), st.integers(1, 500)), data=st.data())
def test_pixels_of_the_input_in_the_image(preprocessing, size, data):
    """Each pixel's center lies where a plain scaling puts it, within half a pixel of the image for the rounded edges."""
    row, column = (data.draw(st.integers(0, side - 1)) for side in preprocessing.size)
    box = preprocessing.to_image(Box(column, row, 1, 1), size)
    for first, length, place, offset, resized, image in (
        (box.top, box.height, row, preprocessing.offset[0], preprocessing.resize[0], size[0]),
        (box.left, box.width, column, preprocessing.offset[1], preprocessing.resize[1], size[1]),
    ):
        assert isinstance(first, int)
        assert isinstance(length, int)
        assert length >= 1
        factor = image / resized
        assert first == pytest.approx((offset + place) * factor, abs=0.501)
        assert first + length == pytest.approx((offset + place + 1) * factor, abs=max(0.501, 1.501 - factor))


@given(preprocessing=croppings(), size=st.tuples(st.integers(1, 500), st.integers(1, 500)))
def test_the_whole_input_is_what_the_network_sees(preprocessing, size):
    height, width = preprocessing.size
    seen = preprocessing.seen(size)
    assert seen.rounded() == preprocessing.to_image(Box(0, 0, width, height), size)
    assert (seen.height, seen.width) == pytest.approx(np.multiply(preprocessing.pixel_size(size), (height, width)))
    if preprocessing.crop is None:
        assert seen.corners == pytest.approx((0, 0, size[1], size[0]))


@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), box=st.tuples(*4 * [st.floats(0.1, 100)]))
def test_cells_fill_the_box(grid, box):
    box = Box(*box)
    cells = [[box.cell(row, column, grid) for column in range(grid[1])] for row in range(grid[0])]
    assert cells[0][0].corners[:2] == pytest.approx(box.corners[:2])
    assert cells[-1][-1].corners[2:] == pytest.approx(box.corners[2:])
    for upper, lower in pairwise(cells):
        assert [cell.corners[3] for cell in upper] == pytest.approx([cell.top for cell in lower])
    for left, right in pairwise(cells[0]):
        assert left.corners[2] == pytest.approx(right.left)
