"""Vectors that extend a memory bank, against a slow reference."""

import numpy as np
from helpers.references import farthest_first as reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from patchcore_plugin.memory_bank.growth import farthest_first

WHOLE = st.integers(-6, 6).map(float)  # distances of whole numbers are the same in float32, ties included


@given(
    points=arrays.arrays(np.float32, st.tuples(st.integers(0, 25), st.just(3)), elements=WHOLE),
    centers=arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(3)), elements=WHOLE),
    radius=st.sampled_from([0.0, 1.0, 2.5, 4.0, 30.0]),
)
def test_farthest_first_picks_what_the_reference_picks(points, centers, radius):
    distances = np.sqrt(((points[:, None] - centers) ** 2).sum(2)).min(1)
    given_distances = distances.copy()
    assert farthest_first(points, distances, radius).tolist() == reference(points, centers, radius=radius)[0]
    np.testing.assert_array_equal(distances, given_distances)
