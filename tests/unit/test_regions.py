"""Regions against SciPy's labeling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from patchcore_plugin.scoring.regions import Region, find_regions


def expected(values, threshold, gaps=(0, 0)):
    above = np.pad(values > threshold, [(0, gap) for gap in gaps])
    box = np.ones((2 * gaps[0] + 1, 2 * gaps[1] + 1), bool)
    box[: gaps[0]], box[:, : gaps[1]] = False, False
    near = ndimage.binary_dilation(above, box) if any(gaps) else above
    labels, _ = ndimage.label(near, structure=np.ones((3, 3)))
    labels = np.where(above, labels, 0)[: values.shape[0], : values.shape[1]]
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


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    share=st.floats(0, 1),
    coarse=st.integers(1, 4),
    gaps=st.tuples(st.integers(0, 30), st.integers(0, 5)),
)
def test_as_scipy(seed, size, share, coarse, gaps):
    values = np.random.default_rng(seed).random(size, np.float32)
    values = np.kron(values, np.ones((coarse, coarse), np.float32))
    for near in ((0, 0), gaps):
        found = find_regions(values, share, near)
        assert sorted(found, key=repr) == sorted(expected(values, share, near), key=repr)
    assert [region.peak for region in found] == sorted((region.peak for region in found), reverse=True)


@pytest.mark.parametrize(("gaps", "count"), [((0, 0), 3), ((0, 3), 2), ((3, 0), 3), ((2, 3), 1), ((1, 3), 2)])
def test_gaps_up_to_which_parts_are_one(gaps, count):
    """Three columns lie between two parts, and two rows and a column between the second and the third."""
    values = np.zeros((9, 9), np.float32)
    values[2, 1] = values[2, 5] = values[5, 7] = 1
    found = find_regions(values, 0.5, gaps)
    assert len(found) == count
    assert sum(region.area for region in found) == 3


def test_spiral_is_one_region():
    spiral = np.zeros((9, 9), np.float32)
    spiral[0, :] = spiral[:, 8] = spiral[8, :] = spiral[2:, 0] = spiral[2, :7] = spiral[2:7, 6] = spiral[6, 2:7] = 1
    (region,) = find_regions(spiral, 0.5)
    assert (region.left, region.top, region.width, region.height) == (0, 0, 9, 9)
    assert region.area == int(spiral.sum())


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_above(value):
    assert find_regions(np.full((4, 4), value, np.float32), 0.5) == []
