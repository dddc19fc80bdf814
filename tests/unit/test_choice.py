"""The choice of an index by measurement."""

import numpy as np
import pytest
from helpers.cpu import set_bfloat16
from scipy.spatial.distance import cdist

from patchcore_plugin.memory_bank import MemoryBank, choice
from patchcore_plugin.memory_bank.choice import MAX_MAP_ERROR, MAX_SCORE_ERROR, choose
from patchcore_plugin.scoring import ScoreRule


@pytest.mark.parametrize("bfloat16", [True, False])
def test_choice(bank_vectors, patch_grids, bfloat16, monkeypatch):
    """The fastest good index is taken; the kind bfloat16 is tried on CPUs that have the arithmetic."""
    set_bfloat16(monkeypatch, bfloat16)
    kinds = ["flat", *(["bfloat16"] if bfloat16 else []), "ivf", "reduced"]
    steps = []
    bank, trials = choose(bank_vectors, patch_grids, ScoreRule(), progress=lambda step, done, total: steps.append(step))
    assert steps == ["neighbors", *(f"index {kind}" for kind in kinds)]
    assert list(dict.fromkeys(trial.index for trial in trials)) == kinds
    (taken,) = [trial for trial in trials if (trial.index, trial.width) == (bank.index, bank.width)]
    assert taken.milliseconds == min(trial.milliseconds for trial in trials if trial.good)
    assert (trials[0].recall, trials[0].error, trials[0].good) == (1, pytest.approx(0, abs=1e-6), True)
    np.testing.assert_array_equal(bank.neighbors, MemoryBank(bank_vectors, num_neighbors=9).neighbors)
    assert all(trial.error <= MAX_SCORE_ERROR for trial in trials if trial.good)


def test_graph_of_narrow_vectors(bank_vectors, patch_grids):
    """A graph of reduced vectors is for wide ones, that of the vectors themselves for others."""
    trials = choose(np.ascontiguousarray(bank_vectors[:, :100]), np.ascontiguousarray(patch_grids[..., :100]), ScoreRule())[
        1
    ]
    assert {trial.index for trial in trials} >= {"flat", "ivf", "hnsw"}
    assert "reduced" not in {trial.index for trial in trials}


@pytest.mark.parametrize("index", ["bfloat16", "ivf", "reduced", "hnsw"])
def test_one_index(bank_vectors, patch_grids, index):
    """The width is the least that is good enough; a new bank that is to be of a kind is of no other."""
    bank, trials = choose(bank_vectors, patch_grids, ScoreRule(), index)
    assert {trial.index for trial in trials} == {index} == {bank.index}
    assert [trial.good for trial in trials[:-1]] == [False] * (len(trials) - 1)
    assert bank.width == trials[-1].width
    exact = cdist(patch_grids.reshape(1024, -1), bank_vectors).min(1)
    found = bank.nearest(patch_grids)[0]
    assert np.mean(found <= exact * (1 + 1e-5) + 1e-5) == pytest.approx(trials[-1].recall, abs=2e-3)


@pytest.mark.parametrize("index", ["ivf", "hnsw", "reduced"])
def test_errors_are_those_of_the_answers(bank_vectors, patch_grids, index):
    """Scores and distances of all images count, those with something pasted too, against float64 arithmetic."""
    pasted = patch_grids[:1] + np.float32(0.5)
    rule = ScoreRule(num_neighbors=1)
    trials = choose(bank_vectors, patch_grids, rule, index, pasted=pasted)[1]
    images = np.concatenate([patch_grids, pasted])
    exact = cdist(images.reshape(-1, images.shape[-1]), bank_vectors).min(1).reshape(len(images), -1)
    level = np.median(exact[: len(patch_grids)].max(1))
    for trial in trials:
        scores = MemoryBank(bank_vectors, index, width=trial.width).score(images, rule)
        map_error = np.quantile(np.abs(scores.patch.reshape(len(images), -1) - exact) / level, 0.999)
        assert trial.error == pytest.approx(np.quantile(np.abs(scores.image / exact.max(1) - 1), 0.999), abs=1e-5)
        assert trial.good == (trial.error <= MAX_SCORE_ERROR and map_error <= MAX_MAP_ERROR)
    if index == "ivf":
        assert not trials[0].good, "the narrowest search errs"


def test_exact_search_where_it_is_asked_for(bank_vectors, patch_grids):
    bank, trials = choose(bank_vectors, patch_grids, ScoreRule(), "flat")
    assert [(trial.index, trial.width) for trial in trials] == [("flat", 0)]
    assert (bank.index, bank.width) == ("flat", 0)


@pytest.mark.parametrize(("index", "least"), [("ivf", 48), ("reduced", 400), ("hnsw", 400)])
def test_bank_that_grows_keeps_its_kind_and_width(bank_vectors, patch_grids, index, least):
    bank, trials = choose(bank_vectors, patch_grids, ScoreRule(), index, least=least)
    assert {trial.index for trial in trials} == {index} == {bank.index}
    assert bank.width >= trials[0].width >= least


@pytest.mark.parametrize("bfloat16", [True, False])
def test_bfloat16_bank_that_grows(bank_vectors, patch_grids, bfloat16, monkeypatch):
    """It stays of its kind, at least as wide, or becomes flat; on a CPU without bfloat16 it becomes flat."""
    set_bfloat16(monkeypatch, bfloat16)
    bank, trials = choose(bank_vectors, patch_grids, ScoreRule(), "bfloat16", least=3)
    assert (trials[-1].index, trials[-1].width, trials[-1].good) == ("flat", 0, True)
    assert [trial.index for trial in trials[:-1]] == ["bfloat16"] * (len(trials) - 1)
    assert bool(trials[:-1]) == bfloat16
    assert not bfloat16 or trials[0].width == 3
    assert next(trial for trial in trials if (trial.index, trial.width) == (bank.index, bank.width)).good


def test_small_banks_are_flat(bank_vectors, patch_grids):
    bank, trials = choose(bank_vectors[:100], patch_grids, ScoreRule())
    assert bank.index == "flat"
    assert len(trials) == 1


def test_bank_that_grows_slow_becomes_flat(bank_vectors, patch_grids, monkeypatch):
    """Where no width answers as exact search does before it takes longer, the others are not tried."""
    monkeypatch.setattr(choice, "_SLOWDOWN_LIMIT", 1e-3)
    measure = choice._Reference.measure

    def measure_strictly(self, bank):
        return measure(self, bank).model_copy(update={"good": bank is self.flat})

    monkeypatch.setattr(choice._Reference, "measure", measure_strictly)
    bank, trials = choose(bank_vectors, patch_grids, ScoreRule(), "hnsw", least=8)
    assert [(trial.index, trial.width) for trial in trials] == [("hnsw", 8), ("flat", 0)]
    assert (bank.index, bank.width) == ("flat", 0)
    assert bank.neighbors is not None


@pytest.mark.parametrize(("storage", "least", "most"), [("int8", 1e-3, 0.1), ("float16", 1e-6, 1e-3)])
def test_error_of_the_storage(bank_vectors, patch_grids, storage, least, most, monkeypatch):
    """A search is judged against exact search in the same storage; the error of the storage is measured beside."""
    set_bfloat16(monkeypatch, True)
    vectors = bank_vectors * np.float32(1.1)  # float16 holds those of the file exactly
    bank, trials = choose(vectors, patch_grids, ScoreRule(), storage=storage)
    assert bank.storage == storage
    assert {trial.index for trial in trials} == {"flat", "ivf", "reduced"}
    assert any(trial.good for trial in trials)
    for trial in trials:
        assert least < trial.storage_error < most
