"""The score arithmetic against slow float64 code, for numpy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.scoring.scores import ScoreRule, anomaly_map, farthest_patches, image_score, reweight


def reference_image_score(embedding: np.ndarray, vectors: np.ndarray, neighbors: int, smoothing: float = 0) -> float:
    """Equations 6 and 7 for one image's patches (h, w, D), in float64 and loops."""
    grid, embedding = embedding.shape[:2], embedding.reshape(-1, embedding.shape[-1])
    embedding, vectors = embedding.astype(np.float64), vectors.astype(np.float64)
    distances = np.array([[np.linalg.norm(patch - vector) for vector in vectors] for patch in embedding])
    worst = int(distances.min(1).argmax())
    nearest = int(distances[worst].argmin())
    largest = distances[worst, nearest]
    image = largest
    if smoothing:
        image = gaussian_filter(distances.min(1).reshape(grid), smoothing, mode="mirror", truncate=4.0).max()
    if min(neighbors, len(vectors)) == 1:
        return image
    around = np.argsort(np.linalg.norm(vectors - vectors[nearest], axis=1), kind="stable")[:neighbors]
    weights = np.exp(distances[worst, around] - distances[worst, around].max())
    return (1 - np.exp(largest - distances[worst, around].max()) / weights.sum()) * image


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    height=st.integers(1, 4),
    width=st.integers(1, 5),
    columns=st.integers(1, 8),
    size=st.integers(1, 20),
    neighbors=st.integers(1, 12),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    smoothing=st.sampled_from([0, 0.4, 1, 2.5]),
)
def test_score(seed, batch, height, width, columns, size, neighbors, scale, smoothing):
    rng = np.random.default_rng(seed)
    vectors = (scale * rng.normal(size=(size, columns))).astype(np.float32)
    embedding = (scale * rng.normal(size=(batch, height, width, columns))).astype(np.float32)
    bank = MemoryBank(vectors)
    rule = ScoreRule(neighbors, smoothing)
    scores = bank.score(embedding, rule)
    expected = [reference_image_score(image, vectors, neighbors, smoothing) for image in embedding]
    np.testing.assert_allclose(scores.image, expected, rtol=1e-3, atol=1e-5 * scale)
    assert scores.patch.shape == (batch, height, width)

    patch = torch.from_numpy(scores.patch)
    rows = farthest_patches(patch)
    queries = embedding.reshape(-1, columns)[rows.numpy()]
    support = torch.from_numpy(bank.support(queries, bank.search(queries)[1][:, 0], neighbors))
    tensors = reweight(image_score(patch, rule), support)
    np.testing.assert_allclose(tensors.numpy(), scores.image, rtol=1e-5, atol=1e-7)


def test_reweight_does_not_overflow():
    result = reweight(np.float32([1000.0]), np.float32([[1000.0, 1500.0, 2000.0]]))
    np.testing.assert_allclose(result, [1000.0])


@pytest.mark.parametrize("size", [(64, 64), (70, 45), (256, 256)])
def test_map_against_torch_and_scipy(size):
    patch = np.random.default_rng(0).random((2, 8, 6)).astype(np.float32)
    upsampled = torch.nn.functional.interpolate(torch.from_numpy(patch)[:, None].double(), size=size, mode="bilinear")
    expected = [gaussian_filter(image, 4, mode="mirror", truncate=4.0) for image in upsampled[:, 0].numpy()]
    np.testing.assert_allclose(anomaly_map(patch, size), expected, rtol=1e-5)
    np.testing.assert_allclose(anomaly_map(torch.from_numpy(patch), size).numpy(), expected, rtol=1e-5)


def test_map_of_one_patch_and_of_one_pixel():
    np.testing.assert_allclose(anomaly_map(np.full((1, 1, 1), 3, np.float32), (40, 30)), 3, rtol=1e-6)
    np.testing.assert_allclose(anomaly_map(np.full((1, 1, 1), 3, np.float32), (1, 1)), 3, rtol=1e-6)


def test_map_keeps_constants_and_range():
    patch = np.random.default_rng(0).random((1, 32, 32)).astype(np.float32)
    values = anomaly_map(patch, (256, 256))
    assert patch.min() <= values.min() <= values.max() <= patch.max()
    np.testing.assert_allclose(anomaly_map(np.ones((1, 7, 9), np.float32), (50, 60)), 1, rtol=1e-6)


def test_unknown_upsampling():
    with pytest.raises(ValueError, match="'bilinear' or 'nearest', got 'cubic'"):
        anomaly_map(np.zeros((1, 2, 2), np.float32), (8, 8), "cubic")


def test_bank_of_one_vector():
    """With no neighbor to weigh by, the score is the distance, not 0."""
    scores = MemoryBank(np.zeros((1, 2))).score(np.float32([[[[3, 4]]]]), ScoreRule(9))
    assert scores.image.tolist() == [5.0]


def test_rule_in_words():
    assert str(ScoreRule(1, 0)) == "largest patch distance"
    assert str(ScoreRule(9, 0.5)) == "largest patch distance, smoothed by 0.5 patches, re-weighted by 9 neighbors"
