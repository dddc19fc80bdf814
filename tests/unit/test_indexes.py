"""The kinds of index: whatever one overlooks, its distances are exact, and an image's score is that of exact search."""

import tracemalloc
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from patchcore_plugin.bundle import IndexKind
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank.indexes import KINDS
from patchcore_plugin.scoring import ScoreRule

BANKS = [
    ("bfloat16", "float32"),
    ("ivf", "float32"),
    ("hnsw", "float32"),
    ("flat", "float16"),
    ("ivf", "float16"),
    ("hnsw", "int8"),
    ("reduced", "float32"),
    ("reduced", "int8"),
]


def test_every_kind_has_a_class_of_that_name():
    assert tuple(KINDS) == get_args(IndexKind)
    for kind, known in KINDS.items():
        low, high = known.width_limits
        assert (known.kind, list(known.widths)) == (kind, sorted(known.widths))
        assert all(low <= width <= high for width in (known.default_width, *known.widths))


@pytest.mark.parametrize(("index", "storage"), BANKS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 200),
    columns=st.integers(1, 40),
    kinds=st.integers(1, 200),
    k=st.integers(1, 12),
    width=st.integers(1, 40),
)
def test_search(index, storage, seed, size, columns, kinds, k, width):
    """Distances are those of the vectors found, in order, with duplicates too, whatever the index overlooks."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(kinds, columns))[rng.integers(0, kinds, size)].astype(np.float32)
    asked = rng.normal(size=(30, columns)).astype(np.float32)
    bank = MemoryBank(vectors, index, storage)
    stored = bank.vectors
    np.testing.assert_allclose(stored, vectors, atol={"float32": 0, "float16": 2e-3, "int8": 0.05}[storage])
    distances, indices = bank.search(asked, k, width)
    assert indices.shape == distances.shape == (30, min(k, size))
    assert ((indices >= 0) & (indices < size)).all()
    assert (np.diff(distances, axis=1) >= 0).all()
    recomputed = np.sqrt(((asked[:, None].astype(np.float64) - stored[indices]) ** 2).sum(2))
    np.testing.assert_allclose(distances, recomputed, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in indices.tolist())


@pytest.mark.parametrize("threads", [None, 2])
@pytest.mark.parametrize(("index", "storage"), [("flat", "float32"), *BANKS])
def test_nearest_of_images(index, storage, threads, bank_vectors, patch_grids):
    """Adjacent patches of one image help each other, and every distance is that of the vector found."""
    vectors, queries = bank_vectors[::2], patch_grids.reshape(1024, -1)
    bank = MemoryBank(vectors, index, storage, width=None if index == "flat" else 1)
    bank.threads = threads
    stored = bank.vectors
    exact = cdist(queries, stored).min(1)
    distances, indices = bank.nearest(patch_grids)
    assert distances.shape == indices.shape == (len(queries),)
    np.testing.assert_allclose(np.linalg.norm(queries - stored[indices], axis=1), distances, rtol=1e-5)
    assert (distances >= exact * (1 - 1e-5)).all()
    missed = (distances > exact * (1 + 1e-5)).mean()
    if index == "flat":
        assert missed == 0
    elif index != "bfloat16":
        alone = bank.search(queries)[0][:, 0]
        assert (distances <= alone).all()
        assert missed < (alone > exact * (1 + 1e-5)).mean() * 0.7
    one_by_one = [np.concatenate(part) for part in zip(*(bank.nearest(grid[None]) for grid in patch_grids), strict=True)]
    np.testing.assert_array_equal(distances, one_by_one[0])
    np.testing.assert_array_equal(indices, one_by_one[1])
    assert [part.shape for part in bank.nearest(patch_grids[:0])] == [(0,), (0,)]


@pytest.mark.parametrize("index", ["ivf", "hnsw", "reduced"])
def test_image_scores_are_exact_where_single_patches_are_overlooked(index, real_embeddings):
    """A narrow search overlooks a few nearest vectors, but the farthest patches are searched for again."""
    vectors, images = real_embeddings[::3], real_embeddings[1:1025].reshape(4, 16, 16, -1)
    flat, narrow = MemoryBank(vectors), MemoryBank(vectors, index, width=1)
    queries = images.reshape(-1, images.shape[-1])
    exact = flat.search(queries)[0]
    assert (narrow.search(queries)[0] > exact * 1.01).any()
    assert (narrow.search(queries)[0] >= exact * (1 - 1e-6)).all()
    expected, scores = flat.score(images, ScoreRule()), narrow.score(images, ScoreRule())
    np.testing.assert_allclose(scores.image, expected.image, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", get_args(IndexKind))
def test_own_threads(index, threads, real_embeddings):
    bank = MemoryBank(real_embeddings[::10], index)
    expected = bank.search(real_embeddings[1:2000], 3)
    bank.threads = threads
    for ours, theirs in zip(bank.search(real_embeddings[1:2000], 3), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    bank.threads = None
    assert bank.search(real_embeddings[:5])[0].shape == (5, 1)


@pytest.mark.parametrize("index", ["bfloat16", "hnsw", "reduced"])
def test_memory_of_an_image_of_many_patches(index):
    """A search takes no more memory for many patches than for some, and gives the answers of fewer at once."""
    rng = np.random.default_rng(0)
    bank = MemoryBank(rng.normal(size=(600, 8)).astype(np.float32), index)
    patches = rng.normal(size=(1, 150, 300, 8)).astype(np.float32)
    parts = [bank.nearest(part) for part in np.split(patches, 15, axis=1)]
    tracemalloc.start()
    distances, indices = bank.nearest(patches)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * patches.nbytes
    recomputed = np.linalg.norm(patches.reshape(-1, 8) - bank.vectors[indices], axis=1)
    np.testing.assert_allclose(distances, recomputed, rtol=1e-5)
    if index == "bfloat16":  # it knows no adjacent patches
        np.testing.assert_allclose(distances, np.concatenate([part[0] for part in parts]), rtol=1e-5)
