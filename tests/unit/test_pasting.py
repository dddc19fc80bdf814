"""Windows pasted into images: small, the same each time, and of images of any size."""

import numpy as np
import pytest

from patchcore_plugin.pasting import PASTE_SIDE, PASTED_IMAGES, paste, paste_windows


def pictures(count, shape=(60, 80, 3)):
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8))


def test_windows_are_small_and_the_same_each_time():
    images = pictures(PASTED_IMAGES + 3)
    before = [image.copy() for image in images]
    first, second = paste_windows(images), paste_windows(images)
    assert len(first) == PASTED_IMAGES
    for image, kept, pasted, again in zip(images, before, first, second, strict=False):
        np.testing.assert_array_equal(image, kept)
        np.testing.assert_array_equal(pasted, again)
        rows, columns = np.nonzero((pasted != image).any(2))
        assert 0 < np.ptp(rows) + 1 <= PASTE_SIDE[1] * 60 + 1
        assert 0 < np.ptp(columns) + 1 <= PASTE_SIDE[1] * 80 + 1


@pytest.mark.parametrize("cells", [(6, 8), (60, 80), (130, 90), (1, 1)])
def test_windows_lie_where_the_image_is_inspected(cells):
    """Their centers do, but for windows at an edge of the image."""
    inspected = np.zeros(cells, bool)
    inspected[-1, 0] = inspected[cells[0] // 2, cells[1] // 2] = True
    images = pictures(PASTED_IMAGES)
    for image, pasted in zip(images, paste_windows(images, inspected), strict=True):
        rows, columns = np.nonzero((pasted != image).any(2))
        center = np.array([(rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2])
        places = (np.argwhere(inspected) + 0.5) * [60, 80] / cells
        half = PASTE_SIDE[1] * np.array([60, 80]) / 2 + 2  # a window at an edge is moved so far, rounding included
        assert (np.abs(places - center) <= half).all(1).any()


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 90, 3), (90, 2, 3)])
def test_tiny_images(shape):
    for seed in range(20):
        pasted = paste(*pictures(2, shape), seed)
        assert (pasted.shape, pasted.dtype) == (shape, np.uint8)


def test_one_image_or_none():
    assert [image.shape for image in paste_windows(pictures(1))] == [(60, 80, 3)]
    assert paste_windows([]) == []
