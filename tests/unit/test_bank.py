"""The memory bank: exact search against brute force in float64, neighbors, scores and arguments."""

import gc

import numpy as np
import pytest
from helpers.references import nearest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.scoring import ScoreRule


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 80),
    columns=st.integers(1, 40),
    queries=st.integers(0, 60),
    k=st.integers(1, 12),
)
def test_search(seed, size, columns, queries, k):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(size, columns)).astype(np.float32)
    asked = rng.normal(size=(queries, columns)).astype(np.float32)
    distances, indices = MemoryBank(vectors).search(asked, k)
    expected, _ = nearest(asked, vectors, min(k, size))
    assert distances.shape == indices.shape == (queries, min(k, size))
    assert distances.dtype == np.float32
    assert indices.dtype == np.int64
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(((asked[:, None] - vectors[indices]) ** 2).sum(2)), distances, rtol=1e-5, atol=1e-6)


def test_search_of_many_queries():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    asked = rng.normal(size=(9001, 16)).astype(np.float32)
    distances, indices = MemoryBank(vectors).search(asked, 3)
    expected, places = nearest(asked, vectors, 3)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert (indices == places).mean() > 0.999


def test_distances_keep_their_digits_far_from_the_origin():
    """A patch that is in the bank is at distance 0 from it, which the expansion of the square would not give."""
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 64)) + 100).astype(np.float32)
    distances, _ = MemoryBank(vectors).search(vectors)
    assert (distances == 0).all()


def test_search_of_real_embeddings(real_embeddings):
    bank = MemoryBank(real_embeddings[::50])
    distances, _ = bank.search(real_embeddings[:2000], 9)
    expected, _ = nearest(real_embeddings[:2000], real_embeddings[::50], 9)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-4)


def test_vectors_outlive_the_bank():
    vectors = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float32)
    view = MemoryBank(vectors).vectors
    gc.collect()
    np.testing.assert_array_equal(view, vectors)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 60), kinds=st.integers(1, 60), count=st.integers(1, 12))
def test_neighbors(seed, size, kinds, count):
    """Each vector comes first among its own neighbors, duplicates or not, and the others are the nearest ones."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(kinds, 6))[rng.integers(0, kinds, size)].astype(np.float32)
    found = MemoryBank(vectors, num_neighbors=count).neighbors
    assert found.shape == (size, min(count, size))
    np.testing.assert_array_equal(found[:, 0], np.arange(size))
    expected, _ = nearest(vectors, vectors, count)
    distances = np.sqrt(((vectors[:, None].astype(np.float64) - vectors[found]) ** 2).sum(2))
    np.testing.assert_allclose(np.sort(distances, axis=1), expected, atol=1e-3)


@pytest.mark.parametrize("num_neighbors", [1, 5, 9])
def test_scores_do_not_depend_on_neighbors_found_in_advance(num_neighbors, bank_vectors, patch_grids):
    expected = MemoryBank(bank_vectors).score(patch_grids, ScoreRule(num_neighbors))
    for in_advance in (5, 9, 12):
        scores = MemoryBank(bank_vectors, num_neighbors=in_advance).score(patch_grids, ScoreRule(num_neighbors))
        np.testing.assert_allclose(scores.image, expected.image, rtol=1e-5)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.empty((0, 3)), "empty"),
        (np.zeros(3), r"matrix \(N, D\)"),
        (np.zeros((3, 0)), r"matrix \(N, D\)"),
        (np.array([[np.nan, 1]]), "NaN"),
        (np.array([[1e300, 1]]), "NaN or infinite"),
        (np.full((3, 2), 1e25), "too large for float32 distances"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_vectors(vectors, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(vectors)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros((2, 4)), 1, "queries have 4 values each, the memory bank's vectors 3"),
        (np.full((2, 3), np.inf), 1, "NaN or infinite"),
        (np.full((1, 3), 1e25), 1, "too large for float32 distances"),
        (np.zeros((2, 3)), 0, "k must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_queries(queries, k, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(np.zeros((5, 3))).search(queries, k)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": "annoy"}, r"index must be one of flat, .*hnsw.*; got 'annoy'"),
        ({"storage": "int4"}, "storage must be one of float32, float16, int8 for the index 'flat'; got 'int4'"),
        ({"index": "bfloat16", "storage": "int8"}, "storage must be one of float32 for the index 'bfloat16'; got 'int8'"),
        ({"index": "hnsw", "width": 0}, r"width must be a whole number in \[1, 65536\], got 0\. The index is 'hnsw'"),
        ({"index": "bfloat16", "width": 17}, r"width must be a whole number in \[1, 16\], got 17\. The index is 'bfloat16'"),
        ({"width": 1}, r"width must be a whole number in \[0, 0\], got 1\. The index is 'flat'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(np.random.default_rng(0).normal(size=(30, 4)), **arguments)


def test_values_too_large_for_float16():
    with pytest.raises(ValueError, match="too large for storage 'float16'"):
        MemoryBank(np.full((3, 2), 70_000.0), storage="float16")
