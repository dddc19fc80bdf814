"""Known defects: distances against a slow reference, and files that cannot be."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.bundle import BundleError
from patchcore_plugin.bundle.content import read_file
from patchcore_plugin.memory_bank import Defects, EnsembleBank, MemoryBank, read_defects, write_defects
from patchcore_plugin.memory_bank.defects import MAX_DEFECTS
from patchcore_plugin.scoring import ScoreRule


def nearest(queries, vectors):
    """Distances by float64 differences."""
    return np.sqrt(((queries[:, None].astype(np.float64) - vectors) ** 2).sum(-1)).min(1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    defects=st.integers(1, 9),
    split=st.sampled_from([None, 3]),
    smoothing=st.sampled_from([0, 1]),
)
def test_scores_against_a_slow_reference(seed, defects, split, smoothing):
    rng = np.random.default_rng(seed)
    vectors, taught = rng.normal(size=(20, 8)), rng.normal(size=(defects, 8))
    embedding = np.concatenate([vectors[:2], taught[:1], rng.normal(size=(9, 8))]).reshape(1, 3, 4, 8).astype(np.float32)
    vectors, taught = vectors.astype(np.float32), taught.astype(np.float32)
    parts, weights = [slice(0, 8)], [1.0]
    bank = MemoryBank(vectors)
    if split:
        parts, weights = [slice(0, split), slice(split, 8)], [1.0, 0.7]
        bank = EnsembleBank([MemoryBank(np.ascontiguousarray(vectors[:, part])) for part in parts], weights)
    members = [
        SimpleNamespace(embedding_dimension=part.stop - part.start, weight=weight)
        for part, weight in zip(parts, weights, strict=True)
    ]
    queries = embedding.reshape(-1, 8)

    def mean(table):
        return sum(w * nearest(queries[:, part], table[:, part]) for part, w in zip(parts, weights, strict=True)) / len(
            parts
        )

    distance = mean(vectors)
    expected = distance + 0.5 * np.maximum(0, distance - mean(taught))
    rule = ScoreRule(num_neighbors=3, score_smoothing=smoothing)
    plain, found = bank.score(embedding, rule), bank.score(embedding, rule, Defects(taught, members))
    np.testing.assert_allclose(found.patch.ravel(), expected, atol=1e-3)
    assert (found.patch >= plain.patch).all()
    assert (found.image >= plain.image).all()


def bundle(*files):
    """What is read of a bundle with these files."""
    members = [SimpleNamespace(embedding_dimension=152, weight=1)]
    manifest = SimpleNamespace(values=152, all_members=members)
    return SimpleNamespace(files={file.name: read_file(file) for file in files}, manifest=manifest)


def test_written_and_read(bank_vectors, tmp_path):
    assert read_defects(bundle()) is None
    write_defects(bank_vectors[:7], tmp_path)
    assert np.array_equal(read_defects(bundle(tmp_path / "defects.npy")).vectors, bank_vectors[:7])


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((3, 151), np.float32),
        np.zeros((3, 152)),
        np.zeros((0, 152), np.float32),
        np.zeros((MAX_DEFECTS + 1, 152), np.float32),
        np.full((3, 152), np.nan, np.float32),
        np.zeros(152, np.float32),
        np.array([{"a": 1}], object),
    ],
)
def test_files_that_cannot_be(tmp_path, content):
    np.save(tmp_path / "defects.npy", content, allow_pickle=True)
    with pytest.raises(BundleError, match=r"defects\.npy"):
        read_defects(bundle(tmp_path / "defects.npy"))
