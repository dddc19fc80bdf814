"""The measured choice of an index."""

import numpy as np
import pytest

from patchcore_plugin.cpu import has_bfloat16
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank import choice as bank_index
from patchcore_plugin.memory_bank.choice import ERROR, RECALL, choose
from patchcore_plugin.scoring import ScoreRule


@pytest.fixture(scope="module")
def images(patch_grids):
    return patch_grids


@pytest.fixture(scope="module")
def vectors(bank_vectors):
    return bank_vectors


def test_choice(vectors, images):
    steps = []
    bank, trials = choose(vectors, images, ScoreRule(), progress=steps.append)
    assert steps == ["neighbours", "index flat", "index ivf", "index hnsw"]
    assert {trial.index for trial in trials} == {"flat", "ivf", "hnsw"}
    taken = [trial for trial in trials if (trial.index, trial.width) == (bank.index, bank.width)]
    assert len(taken) == 1
    assert taken[0].milliseconds == min(trial.milliseconds for trial in trials if trial.good)
    assert trials[0].good
    assert (trials[0].recall, trials[0].error) == (1, pytest.approx(0, abs=1e-6))
    assert {trial.width > 0 for trial in trials if trial.index == "flat"} == {False, has_bfloat16()}
    np.testing.assert_array_equal(bank.neighbors, MemoryBank(vectors, num_neighbors=9).neighbors)
    for trial in trials:
        assert trial.good == (trial.recall >= RECALL and trial.error <= ERROR)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_one_index(vectors, images, index):
    """Its width is the least that answers well enough; what is measured of it is so."""
    bank, trials = choose(vectors, images, ScoreRule(), index)
    assert {trial.index for trial in trials} == {index} == {bank.index}
    assert [trial.good for trial in trials[:-1]] == [False] * (len(trials) - 1)
    assert bank.width == trials[-1].width
    queries = images.reshape(-1, 152)
    distances = bank.nearest(images)[0]
    best = np.concatenate([np.linalg.norm(row - vectors, axis=1).min(keepdims=True) for row in queries])
    assert np.mean(distances <= best * (1 + 1e-5) + 1e-5) == pytest.approx(trials[-1].recall, abs=2e-3)


@pytest.mark.parametrize(("storage", "bfloat16"), [("float16", True), ("float32", False)])
def test_no_product(vectors, images, storage, bfloat16, monkeypatch):
    """It is for CPUs that have bfloat16, and for banks that are not stored in less."""
    monkeypatch.setattr(bank_index, "has_bfloat16", lambda: bfloat16)
    _, trials = choose(vectors, images[:1], ScoreRule(), storage=storage)
    assert [trial.width for trial in trials if trial.index == "flat"] == [0]


def test_flat(vectors, images, monkeypatch):
    """Exact where it is asked for; a bank that grows keeps its product, at least as wide, or becomes exact."""
    bank, trials = choose(vectors, images, ScoreRule(), "flat")
    assert [(trial.index, trial.width) for trial in trials] == [("flat", 0)]
    assert bank.width == 0
    monkeypatch.setattr(bank_index, "has_bfloat16", lambda: True)
    bank, trials = choose(vectors, images, ScoreRule(), "flat", least=3)
    assert {trial.index for trial in trials} == {"flat"}
    assert trials[0].width == 3
    assert (trials[-1].width, trials[-1].good) == (0, True)
    assert next(trial for trial in trials if trial.width == bank.width).good


def test_small_banks_are_flat(images, vectors):
    bank, trials = choose(vectors[:100], images, ScoreRule())
    assert bank.index == "flat"
    assert len(trials) == 1


@pytest.mark.parametrize(("storage", "least", "most"), [("int8", ERROR, 0.1), ("float16", 1e-6, ERROR)])
def test_what_a_storage_costs_is_on_record(vectors, images, storage, least, most):
    """A search is judged among the vectors as they are stored; what storing them did is told beside."""
    vectors = vectors * np.float32(1.1)  # values that float16 does not hold, which those of the file are
    bank, trials = choose(vectors, images, ScoreRule(), storage=storage)
    assert bank.storage == storage
    assert any(trial.good for trial in trials)
    for trial in trials:
        assert least < trial.storage_error < most
