"""Candidates by a product in bfloat16, and the flat index that searches by them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank import bank as memory_bank
from patchcore_plugin.memory_bank import bfloat16 as bank_product
from patchcore_plugin.memory_bank.bfloat16 import PARTS, Product
from patchcore_plugin.scoring import ScoreRule


def distances(queries, vectors):
    """Slow and obvious, in float64."""
    return np.array([np.linalg.norm(query - vectors.astype(np.float64), axis=1) for query in queries.astype(np.float64)])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 700),
    columns=st.integers(1, 70),
    kinds=st.integers(1, 700),
    scale=st.integers(-12, 12),
    offset=st.sampled_from([0, 1, 100]),
    count=st.integers(1, PARTS),
)
def test_candidates(seed, size, columns, kinds, scale, offset, count):
    """Different vectors, the first of them as near as any but for what bfloat16 rounds, at all scales."""
    rng = np.random.default_rng(seed)
    vectors = ((rng.normal(size=(kinds, columns)) + offset)[rng.integers(0, kinds, size)] * 10.0**scale).astype(np.float32)
    queries = np.concatenate([(rng.normal(size=(20, columns)) + offset) * 10.0**scale, vectors[:5]]).astype(np.float32)
    found = Product(vectors, count, 1).candidates(queries)
    assert found.dtype == np.int64
    assert found.shape[0] == len(queries)
    assert min(count, -(-size // 64)) <= found.shape[1] <= min(count, size)
    assert ((found >= 0) & (found < size)).all()
    assert all(len(set(row)) == len(row) for row in found.tolist())
    exact = distances(queries, vectors)
    best = np.take_along_axis(exact, found, 1)[:, 0]
    mean = vectors.astype(np.float64).mean(0)
    lengths = np.linalg.norm(queries - mean, axis=1) + np.linalg.norm(vectors - mean, axis=1).max()
    assert (best**2 <= exact.min(1) ** 2 + 0.02 * lengths**2).all()


@pytest.mark.parametrize("bfloat16", [True, False])
def test_real_patches(bfloat16, bank_vectors, patch_grids, monkeypatch):
    """The nearest is nearly always among the first three; on a CPU without bfloat16 the product is one of float32."""
    if not bfloat16:
        monkeypatch.setattr(bank_product, "has_bfloat16", lambda: False)
    vectors, queries = bank_vectors[::2], patch_grids.reshape(1024, -1)
    found = Product(vectors, 3, 2).candidates(queries)
    exact = distances(queries, vectors)
    best = np.take_along_axis(exact, found, 1)
    assert (best.min(1) <= exact.min(1) * (1 + 1e-6)).mean() > (0.995 if bfloat16 else 0.9999)


def test_terms():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.float32(1e3)
    terms = bank_product._terms(values)
    assert not (terms.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_array_equal(terms.astype(np.float64).sum(1), values)


@pytest.mark.parametrize("threads", [None, 2])
def test_from_several_threads(threads, bank_vectors, patch_grids, monkeypatch):
    """The first images come at the same time: one product is made, and answers are those of images one by one."""
    made = []
    monkeypatch.setattr(memory_bank, "Product", lambda *arguments: made.append(arguments) or Product(*arguments))
    bank = MemoryBank(bank_vectors, width=2, num_neighbors=5)
    bank.threads = threads
    images = [grid[None] for grid in patch_grids] * 5
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda image: bank.score(image, ScoreRule(5)), images))
    assert len(made) == 1
    alone = [bank.score(image, ScoreRule(5)) for image in images]
    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours.image, expected.image)
        np.testing.assert_array_equal(ours.patch, expected.patch)
    batch = bank.score(np.concatenate(images[:4]), ScoreRule(5))
    np.testing.assert_array_equal(batch.patch, np.concatenate([scores.patch for scores in alone[:4]]))
    np.testing.assert_array_equal(batch.image, np.concatenate([scores.image for scores in alone[:4]]))


@pytest.mark.parametrize("width", [1, 3])
def test_distances_are_exact(width, bank_vectors, patch_grids):
    images = patch_grids
    queries = images.reshape(-1, images.shape[-1])
    bank = MemoryBank(bank_vectors, width=width)
    found, indices = bank.nearest(images)
    np.testing.assert_allclose(np.linalg.norm(queries - bank.vectors[indices], axis=1), found, rtol=1e-5)
    exact = distances(queries, bank.vectors).min(1)
    assert (found >= exact * (1 - 1e-5)).all()
    assert (found <= exact * 1.02 + 1e-3).all()
    expected = MemoryBank(bank_vectors).score(images, ScoreRule(9)).image
    np.testing.assert_allclose(bank.score(images, ScoreRule(9)).image, expected, rtol=1e-4)
    assert [part.shape for part in bank.nearest(images[:0])] == [(0,), (0,)]


def test_saved_loaded_grown(tmp_path, bank_vectors, real_embeddings):
    """The file is that of a flat index; the width comes from elsewhere, and what is added is found."""
    new = real_embeddings[2048:]
    image = new.reshape(1, 32, 32, -1)
    MemoryBank(bank_vectors, width=2).save(tmp_path / "bank.faiss")
    bank = MemoryBank.load(tmp_path / "bank.faiss")
    assert (bank.index, bank.width) == ("flat", 0)
    bank.width = 2
    before = bank.nearest(image)[0]
    assert before.max() > 1
    bank.add(new)
    found, indices = bank.nearest(image)
    np.testing.assert_array_equal(indices, np.arange(2048, 3072))
    assert not found.any()


@pytest.mark.parametrize(
    ("storage", "width", "most"), [("float32", -1, PARTS), ("float32", PARTS + 1, PARTS), ("int8", 1, 0)]
)
def test_width(storage, width, most):
    with pytest.raises(ValueError, match=f"width must be from 0 to {most} for the index 'flat' in {storage}, got {width}"):
        MemoryBank(np.eye(3), storage=storage, width=width)


def test_many_grids(bank_vectors, real_embeddings):
    """Images of several grids, the smallest of one patch, each with its own compiled product."""
    bank = MemoryBank(bank_vectors, width=2)
    for side in (1, 3, 32):
        image = real_embeddings[2048 : 2048 + side * side].reshape(1, side, side, -1)
        exact = distances(image.reshape(-1, 152), bank.vectors).min(1)
        np.testing.assert_allclose(bank.nearest(image)[0], exact, rtol=0.02)
