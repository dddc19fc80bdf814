"""Regions against SciPy's labeling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from patchcore_plugin.scoring.regions import Region, find_regions


def expected(values, threshold):
    labels, _ = ndimage.label(values > threshold, structure=np.ones((3, 3)))
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels == number
        found.append(
            Region(
                columns.start,
                rows.start,
                columns.stop - columns.start,
                rows.stop - rows.start,
                int(inside.sum()),
                float(values[inside].max()),
            )
        )
    return found


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    share=st.floats(0, 1),
    coarse=st.integers(1, 4),
)
def test_as_scipy(seed, size, share, coarse):
    values = np.random.default_rng(seed).random(size, np.float32)
    values = np.kron(values, np.ones((coarse, coarse), np.float32))
    found = find_regions(values, share)
    assert sorted(found, key=repr) == sorted(expected(values, share), key=repr)
    assert [region.peak for region in found] == sorted((region.peak for region in found), reverse=True)


def test_spiral_is_one_region():
    spiral = np.zeros((9, 9), np.float32)
    spiral[0, :] = spiral[:, 8] = spiral[8, :] = spiral[2:, 0] = spiral[2, :7] = spiral[2:7, 6] = spiral[6, 2:7] = 1
    (region,) = find_regions(spiral, 0.5)
    assert (region.left, region.top, region.width, region.height) == (0, 0, 9, 9)
    assert region.area == int(spiral.sum())


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_above(value):
    assert find_regions(np.full((4, 4), value, np.float32), 0.5) == []
