"""Collecting embeddings, with memory for all of them and with less."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.coreset import GreedyCoreset, embedding_store
from patchcore_plugin.coreset.embedding_store import EmbeddingStore, check_budget, free_memory


def fill(store: EmbeddingStore, points: np.ndarray, step: int = 700) -> EmbeddingStore:
    for part in torch.from_numpy(points).split(step):
        store.append(part)
    return store


def covering_radius(points: np.ndarray, bank: torch.Tensor) -> float:
    points, bank = points.astype(np.float64), bank.double().numpy()
    parts = [points[start : start + 200] for start in range(0, len(points), 200)]
    return max(float(np.sqrt(((part[:, None] - bank) ** 2).sum(2).min(1)).max()) for part in parts)


def data(rng, rows: int, columns: int) -> np.ndarray:
    centres = rng.normal(size=(15, columns)) * 3
    return (centres[rng.integers(0, 15, rows)] + rng.normal(size=(rows, columns))).astype(np.float32)


def bytes_for(rows: int, columns: int, share: float = 0.5) -> float:
    """Budget for a matrix, given the bank's share of the rows."""
    return rows * (columns * 4 * (1 + share) + 56) / 0.9 + 1


@pytest.fixture
def points() -> np.ndarray:
    return data(np.random.default_rng(0), 12_000, 12)


@pytest.mark.parametrize("expected", [12_000, 15_000, None])
def test_with_room_for_all_the_bank_is_exact(points, expected):
    store = fill(EmbeddingStore(GreedyCoreset(ratio=0.02, progress=False), expected_rows=expected, budget=2**26), points)
    sampler = GreedyCoreset(ratio=0.02, progress=False)
    assert torch.equal(store.bank(), torch.from_numpy(points)[sampler.fit(points)])
    assert torch.equal(store.numbers_, sampler.fit(points))
    assert store.radius_ == sampler.radius_
    assert store.reductions == 0
    assert store.rows == len(points)


def test_more_rows_than_expected_are_not_lost(points):
    store = fill(EmbeddingStore(GreedyCoreset(size=100, progress=False), expected_rows=3000, budget=2**26), points)
    bank = store.bank()
    assert len(bank) == 100
    assert covering_radius(points, bank) <= store.radius_


@pytest.mark.parametrize("order", ["random", "by cluster"])
def test_ten_times_the_budget(points, order):
    if order == "by cluster":
        points = points[points[:, 0].argsort()]
    store = fill(
        EmbeddingStore(
            GreedyCoreset(ratio=0.01, progress=False), expected_rows=len(points), budget=bytes_for(1200, 12, 0.01)
        ),
        points,
    )
    bank = store.bank()
    assert len(bank) == 120
    assert store.reductions
    assert torch.equal(torch.from_numpy(points)[store.numbers_], bank)
    exact = GreedyCoreset(ratio=0.01, progress=False)
    exact.fit(points)
    reached = covering_radius(points, bank)
    assert reached <= store.radius_
    assert reached < 1.35 * exact.radius_


def test_bank_that_does_not_fit_is_as_large_as_fits(points, caplog):
    store = EmbeddingStore(GreedyCoreset(ratio=0.5, progress=False), expected_rows=len(points), budget=bytes_for(2000, 12))
    with caplog.at_level(logging.WARNING):
        bank = fill(store, points).bank()
    assert 1000 <= len(bank) <= 2000
    assert "instead of 6000. Raise memory_budget" in caplog.text
    assert covering_radius(points, bank) <= store.radius_


def test_radius_is_kept_while_streaming(points):
    radius = 4.4
    store = fill(EmbeddingStore(GreedyCoreset(radius=radius, progress=False), budget=bytes_for(2500, 12)), points)
    bank = store.bank()
    assert store.reductions == 0
    assert store.radius_ == radius
    assert covering_radius(points, bank) <= radius
    assert len(bank.unique(dim=0)) == len(bank)
    assert len(bank) < 1.5 * len(GreedyCoreset(radius=radius, progress=False).fit(points))


def test_radius_too_small_for_the_budget(points, caplog):
    store = fill(EmbeddingStore(GreedyCoreset(radius=0.1, progress=False), budget=bytes_for(1500, 12)), points)
    with caplog.at_level(logging.WARNING):
        bank = store.bank()
    assert "too small for a coreset radius of 0.1" in caplog.text
    assert covering_radius(points, bank) <= store.radius_


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 6000),
    columns=st.integers(1, 6),
    step=st.integers(1, 3000),
    ratio=st.sampled_from([0.001, 0.02, 0.3]),
    values=st.sampled_from(["clusters", "few", "constant"]),
)
def test_the_radius_promised_holds(seed, rows, columns, step, ratio, values):
    rng = np.random.default_rng(seed)
    points = {
        "clusters": lambda: data(rng, rows, columns),
        "few": lambda: rng.integers(0, 3, (rows, columns)).astype(np.float32),
        "constant": lambda: np.ones((rows, columns), dtype=np.float32),
    }[values]()
    store = EmbeddingStore(GreedyCoreset(ratio=ratio, progress=False), budget=bytes_for(1024, columns))
    bank = fill(store, points, step).bank()
    assert 1 <= len(bank) <= max(1, int(rows * ratio))
    assert covering_radius(points, bank) <= store.radius_ * (1 + 1e-6)
    assert set(map(tuple, bank.tolist())) <= set(map(tuple, points.tolist()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_memory(points, dtype):
    store = EmbeddingStore(GreedyCoreset(size=50, progress=False), dtype=dtype, expected_rows=len(points), budget=2**26)
    fill(store, points)
    assert store._matrix.element_size() == 2
    expected = torch.from_numpy(points).to(dtype)
    assert torch.equal(store.bank(), expected[GreedyCoreset(size=50, progress=False).fit(expected)])


def test_budget_that_holds_next_to_nothing(points):
    store = EmbeddingStore(GreedyCoreset(progress=False), expected_rows=len(points), budget=1000)
    with pytest.raises(ValueError, match=r"memory budget of .* holds 8 patch embeddings.*Raise memory_budget to at least"):
        fill(store, points)


def test_next_to_no_free_memory(points, monkeypatch):
    monkeypatch.setattr(embedding_store, "free_memory", lambda *_: 1000)
    with pytest.raises(ValueError, match=r"free memory, of which .* holds 6 patch embeddings.*Free at least .* GiB, or use"):
        fill(EmbeddingStore(GreedyCoreset(progress=False), expected_rows=len(points)), points)


@pytest.mark.parametrize("expected", [12_000, None])
def test_default_budget_that_does_not_hold_all_is_said(points, monkeypatch, caplog, expected):
    monkeypatch.setattr(embedding_store, "free_memory", lambda *_: bytes_for(3000, 12))
    store = EmbeddingStore(GreedyCoreset(ratio=0.01, progress=False), expected_rows=expected)
    with caplog.at_level(logging.INFO):
        bank = fill(store, points).bank()
    assert len(bank) == 120
    expected = "12000 patch embeddings of 12 values do not fit" if expected else "number of patch embeddings is not known"
    assert expected in caplog.text
    assert "Reduced" in caplog.text


@pytest.mark.parametrize("expected", [0, 1])
def test_expectation_far_too_low(points, expected):
    store = EmbeddingStore(GreedyCoreset(size=100, progress=False), expected_rows=expected)
    assert len(fill(store, points).bank()) == 100


def test_memory_of_a_container(tmp_path, monkeypatch):
    """What it may still take is its limit less its use, of which cached files give way."""
    for name, text in {"memory.max": "3000000", "memory.current": "2500000"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 300000\ninactive_file 1000000\nfile 9\n")
    places = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"))
    monkeypatch.setattr(embedding_store, "_CONTAINER", [("/no/such/limit", "/no/such/use"), places])
    assert free_memory(torch.device("cpu")) == 1_800_000
    assert free_memory(torch.device("cpu"), processes=2) == 900_000
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(torch.device("cpu")) > 10_000_000


def test_nothing_collected():
    with pytest.raises(ValueError, match="no embeddings"):
        EmbeddingStore(GreedyCoreset()).bank()


def test_other_width(points):
    store = fill(EmbeddingStore(GreedyCoreset()), points)
    with pytest.raises(ValueError, match="Embeddings of 3 values do not go with those of 12"):
        store.append(torch.zeros(4, 3))


def test_default_budget_is_of_the_free_memory():
    import psutil

    free = free_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total
    assert free_memory(torch.device("cpu"), processes=4) < free


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "much", True])
def test_wrong_budget(value):
    with pytest.raises(ValueError, match="memory_budget must be a number of GiB above 0"):
        check_budget(value)
