"""The measured choice of an index."""

import numpy as np
import pytest

from patchcore_plugin.bank_index import ERROR, RECALL, choose


@pytest.fixture(scope="module")
def images(real_embeddings):
    """Three images' patches (3, 32, 32, 152) that are not in the bank, which is the other three's."""
    return real_embeddings[3072:].reshape(3, 32, 32, -1)


@pytest.fixture(scope="module")
def vectors(real_embeddings):
    return real_embeddings[:3072]


def test_choice(vectors, images):
    steps = []
    bank, trials = choose(vectors, images, num_neighbors=9, progress=steps.append)
    assert steps == ["index flat", "index ivf", "index hnsw", "neighbours"]
    assert {trial.index for trial in trials} == {"flat", "ivf", "hnsw"}
    taken = [trial for trial in trials if (trial.index, trial.width) == (bank.index, bank.width)]
    assert len(taken) == 1
    assert taken[0].milliseconds == min(trial.milliseconds for trial in trials if trial.good)
    assert trials[0].good
    assert (trials[0].recall, trials[0].error) == (1, pytest.approx(0, abs=1e-6))
    assert bank.neighbors.shape == (len(vectors), 9)
    for trial in trials:
        assert trial.good == (trial.recall >= RECALL and trial.error <= ERROR)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_one_index(vectors, images, index):
    """Its width is the least that answers well enough; what is measured of it is so."""
    bank, trials = choose(vectors, images, 9, index)
    assert {trial.index for trial in trials} == {index} == {bank.index}
    assert [trial.good for trial in trials[:-1]] == [False] * (len(trials) - 1)
    assert bank.width == trials[-1].width
    queries = images.reshape(-1, 152)
    distances = bank.nearest(images)[0]
    best = np.concatenate([np.linalg.norm(row - vectors, axis=1).min(keepdims=True) for row in queries])
    assert np.mean(distances <= best * (1 + 1e-5) + 1e-5) == pytest.approx(trials[-1].recall, abs=2e-3)


def test_small_banks_are_flat(images, vectors):
    bank, trials = choose(vectors[:100], images, 9)
    assert bank.index == "flat"
    assert len(trials) == 1


@pytest.mark.parametrize(("storage", "least", "most"), [("int8", ERROR, 0.1), ("float16", 1e-6, ERROR)])
def test_what_a_storage_costs_is_on_record(vectors, images, storage, least, most):
    """A search is judged among the vectors as they are stored; what storing them did is told beside."""
    bank, trials = choose(vectors, images, 9, storage=storage)
    assert bank.storage == storage
    assert any(trial.good for trial in trials)
    for trial in trials:
        assert least < trial.storage_error < most
