"""Candidates by a matrix product in bfloat16, and the index that searches by them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino as ov
import pytest
from helpers.cpu import set_bfloat16
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from patchcore_plugin.cpu import has_bfloat16
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank.bfloat16 import CANDIDATES_LIMIT, BFloat16Candidates
from patchcore_plugin.scoring import ScoreRule


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 700),
    columns=st.integers(1, 70),
    kinds=st.integers(1, 700),
    scale=st.integers(-12, 12),
    offset=st.sampled_from([0, 1, 100]),
    count=st.integers(1, CANDIDATES_LIMIT),
)
def test_candidates(seed, size, columns, kinds, scale, offset, count):
    """Candidates are different vectors, the first as near as any but for the rounding of bfloat16, at all scales."""
    rng = np.random.default_rng(seed)
    vectors = ((rng.normal(size=(kinds, columns)) + offset)[rng.integers(0, kinds, size)] * 10.0**scale).astype(np.float32)
    queries = np.concatenate([(rng.normal(size=(20, columns)) + offset) * 10.0**scale, vectors[:5]]).astype(np.float32)
    found = BFloat16Candidates(vectors, count, 1).find(queries)
    assert found.dtype == np.int64
    assert found.shape[0] == len(queries)
    assert min(count, -(-size // 64)) <= found.shape[1] <= min(count, size)
    assert ((found >= 0) & (found < size)).all()
    assert all(len(set(row)) == len(row) for row in found.tolist())
    exact = cdist(queries, vectors)
    best = np.take_along_axis(exact, found, 1)[:, 0]
    mean = vectors.astype(np.float64).mean(0)
    lengths = np.linalg.norm(queries - mean, axis=1) + np.linalg.norm(vectors - mean, axis=1).max()
    assert (best**2 <= exact.min(1) ** 2 + 0.02 * lengths**2).all()


@pytest.mark.parametrize("bfloat16", [True, False])
def test_real_patches(bfloat16, bank_vectors, patch_grids, monkeypatch):
    """The nearest vector is nearly always among three candidates; without bfloat16, the product is one of float32."""
    if not bfloat16:
        set_bfloat16(monkeypatch, False)
    vectors, queries = bank_vectors[::2], patch_grids.reshape(1024, -1)
    found = BFloat16Candidates(vectors, 3, 2).find(queries)
    exact = cdist(queries, vectors)
    best = np.take_along_axis(exact, found, 1)
    assert (best.min(1) <= exact.min(1) * (1 + 1e-6)).mean() > (0.995 if bfloat16 else 0.9999)


@pytest.mark.parametrize("threads", [None, 2])
def test_from_several_threads(threads, bank_vectors, patch_grids, monkeypatch):
    """The first images come at the same time: one product is compiled, and answers are those of images one by one."""
    compiled, compile_model = [], ov.Core.compile_model
    monkeypatch.setattr(
        ov.Core, "compile_model", lambda self, *arguments: compiled.append(self) or compile_model(self, *arguments)
    )
    bank = MemoryBank(bank_vectors, "bfloat16", num_neighbors=5)
    bank.threads = threads
    images = [grid[None] for grid in patch_grids] * 5
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda image: bank.score(image, ScoreRule(5)), images))
    assert len(compiled) == 1
    alone = [bank.score(image, ScoreRule(5)) for image in images]
    for ours, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours.image, expected.image)
        np.testing.assert_array_equal(ours.patch, expected.patch)
    batch = bank.score(np.concatenate(images[:4]), ScoreRule(5))
    np.testing.assert_array_equal(batch.patch, np.concatenate([scores.patch for scores in alone[:4]]))
    np.testing.assert_array_equal(batch.image, np.concatenate([scores.image for scores in alone[:4]]))


@pytest.mark.parametrize("width", [1, 3])
def test_distances_are_exact(width, bank_vectors, patch_grids):
    queries = patch_grids.reshape(1024, -1)
    bank = MemoryBank(bank_vectors, "bfloat16", width=width)
    found, indices = bank.nearest(patch_grids)
    np.testing.assert_allclose(np.linalg.norm(queries - bank_vectors[indices], axis=1), found, rtol=1e-5)
    exact = cdist(queries, bank_vectors).min(1)
    assert (found >= exact * (1 - 1e-5)).all()
    assert (found <= exact * 1.02 + 1e-3).all()
    expected = MemoryBank(bank_vectors).score(patch_grids, ScoreRule(9)).image
    np.testing.assert_allclose(bank.score(patch_grids, ScoreRule(9)).image, expected, rtol=1e-4)


def test_wider_after_the_first_image(bank_vectors, patch_grids):
    """A new width holds from the next image on, and finds at least what the narrower search found."""
    bank = MemoryBank(bank_vectors, "bfloat16", width=1)
    narrow = bank.nearest(patch_grids)[0]
    bank.width = CANDIDATES_LIMIT
    wide = bank.nearest(patch_grids)[0]
    assert (wide <= narrow).all()
    assert (wide < narrow).any() or not has_bfloat16()  # without it the product is float32, and one candidate is enough


def test_many_grids(bank_vectors, real_embeddings):
    """Images of several grids, the smallest of one patch, each with a compiled product of its own."""
    bank = MemoryBank(bank_vectors, "bfloat16", width=2)
    for side in (1, 3, 32):
        image = real_embeddings[2048 : 2048 + side * side].reshape(1, side, side, -1)
        exact = cdist(image.reshape(-1, 152), bank_vectors).min(1)
        np.testing.assert_allclose(bank.nearest(image)[0], exact, rtol=0.02)
