"""FAISS bank against brute force in float64."""

import gc

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.memory_bank import MemoryBank


def reference(queries, vectors, k):
    distances = np.sqrt(((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2))
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, axis=1), indices


@settings(max_examples=50, deadline=None)
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
    expected, _ = reference(asked, vectors, min(k, size))
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
    expected, nearest = reference(asked, vectors, 3)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert (indices == nearest).mean() > 0.999


def test_distances_keep_their_digits_far_from_the_origin():
    """A patch of the bank is at distance 0 from it, which the expansion of the square would not give."""
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 64)) + 100).astype(np.float32)
    distances, _ = MemoryBank(vectors).search(vectors)
    assert (distances == 0).all()


def test_real_embeddings(real_embeddings):
    bank = MemoryBank(real_embeddings[::50])
    distances, _ = bank.search(real_embeddings[:2000], 9)
    expected, _ = reference(real_embeddings[:2000], real_embeddings[::50], 9)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-4)


def test_save_and_load(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    path = tmp_path / "bänk.faiss"
    MemoryBank(vectors).save(path)
    loaded = MemoryBank.load(path)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    assert (len(loaded), loaded.dimension) == (50, 7)


def test_vectors_outlive_the_bank():
    vectors = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float32)
    view = MemoryBank(vectors).vectors
    gc.collect()
    np.testing.assert_array_equal(view, vectors)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.empty((0, 3)), "empty"),
        (np.zeros(3), r"matrix \(N, D\)"),
        (np.zeros((3, 0)), r"matrix \(N, D\)"),
        (np.array([[np.nan, 1]]), "NaN"),
        (np.array([[1e300, 1]]), "NaN or infinite"),
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
        (np.zeros((2, 3)), 0, "k must be at least 1"),
    ],
)
def test_bad_queries(queries, k, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(np.zeros((5, 3))).search(queries, k)


@pytest.mark.parametrize("content", [b"", b"not an index", b"IxF2" + b"\xff" * 60])
def test_load_of_something_else(tmp_path, content):
    path = tmp_path / "bank.faiss"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable FAISS index"):
        MemoryBank.load(path)


def test_load_of_a_truncated_bank(tmp_path):
    path = tmp_path / "bank.faiss"
    MemoryBank(np.ones((100, 8))).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable FAISS index"):
        MemoryBank.load(path)


def test_load_of_another_kind_of_index(tmp_path):
    path = tmp_path / "bank.faiss"
    path.write_bytes(faiss.serialize_index(faiss.IndexFlatIP(4)).tobytes())
    with pytest.raises(ValueError, match="a memory bank is a flat L2 index"):
        MemoryBank.load(path)


def test_load_of_an_empty_or_poisoned_bank(tmp_path):
    path = tmp_path / "bank.faiss"
    index = faiss.IndexFlatL2(2)
    path.write_bytes(faiss.serialize_index(index).tobytes())
    with pytest.raises(ValueError, match="empty memory bank"):
        MemoryBank.load(path)
    index.add(np.full((1, 2), np.nan, np.float32))
    path.write_bytes(faiss.serialize_index(index).tobytes())
    with pytest.raises(ValueError, match="NaN or infinite"):
        MemoryBank.load(path)


def test_values_too_large_for_float32_distances():
    with pytest.raises(ValueError, match="too large"):
        MemoryBank(np.full((3, 2), 1e25))
    with pytest.raises(ValueError, match="too large"):
        MemoryBank(np.ones((3, 2))).search(np.full((1, 2), 1e25))
