"""Collecting embeddings, with memory for all of them and with less."""

import logging
import re

import numpy as np
import pytest
import torch
from helpers.references import covering_radius
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.embedding_store import EmbeddingStore
from patchcore_plugin.coreset.memory import RowCost, free_memory, plan_memory


def fill(store: EmbeddingStore, points: np.ndarray, step: int = 700) -> EmbeddingStore:
    for part in torch.from_numpy(points).split(step):
        store.append(part)
    return store


def data(rng, rows: int, columns: int) -> np.ndarray:
    centers = rng.normal(size=(15, columns)) * 3
    return (centers[rng.integers(0, 15, rows)] + rng.normal(size=(rows, columns))).astype(np.float32)


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
    assert torch.equal(store.reduce_to_bank(), torch.from_numpy(points)[sampler.fit(points)])
    assert torch.equal(store.numbers_, sampler.fit(points))
    assert store.radius_ == sampler.radius_
    assert store.reductions == 0
    assert store.rows == len(points)


def test_more_rows_than_expected_are_not_lost(points):
    store = fill(EmbeddingStore(GreedyCoreset(size=100, progress=False), expected_rows=3000, budget=2**26), points)
    bank = store.reduce_to_bank()
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
    bank = store.reduce_to_bank()
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
        bank = fill(store, points).reduce_to_bank()
    assert 1000 <= len(bank) <= 2000
    assert "instead of 6000. Raise memory_budget" in caplog.text
    assert covering_radius(points, bank) <= store.radius_


def test_radius_is_kept_while_streaming(points):
    radius = 4.4
    store = fill(EmbeddingStore(GreedyCoreset(radius=radius, progress=False), budget=bytes_for(2500, 12)), points)
    bank = store.reduce_to_bank()
    assert store.reductions == 0
    assert store.radius_ == radius
    assert covering_radius(points, bank) <= radius
    assert len(bank.unique(dim=0)) == len(bank)
    assert len(bank) < 1.5 * len(GreedyCoreset(radius=radius, progress=False).fit(points))


def test_radius_too_small_for_the_budget(points, caplog):
    store = fill(EmbeddingStore(GreedyCoreset(radius=0.1, progress=False), budget=bytes_for(1500, 12)), points)
    with caplog.at_level(logging.WARNING):
        bank = store.reduce_to_bank()
    assert "too small for a coreset radius of 0.1" in caplog.text
    assert covering_radius(points, bank) <= store.radius_


@settings(max_examples=40)
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
    bank = fill(store, points, step).reduce_to_bank()
    assert 1 <= len(bank) <= max(1, int(rows * ratio))
    assert covering_radius(points, bank) <= store.radius_ * (1 + 1e-6)
    assert set(map(tuple, bank.tolist())) <= set(map(tuple, points.tolist()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_memory(points, dtype):
    """A budget that holds all embeddings in 16 bits does not hold them in 32."""
    budget = bytes_for(len(points), columns=6, share=0.01)
    sampler = GreedyCoreset(size=50, progress=False)
    half, full = (
        fill(EmbeddingStore(sampler, dtype=kind, expected_rows=len(points), budget=budget), points)
        for kind in (dtype, torch.float32)
    )
    assert (half.reductions, full.reductions > 0) == (0, True)
    expected = torch.from_numpy(points).to(dtype)
    assert torch.equal(half.reduce_to_bank(), expected[sampler.fit(expected)])


def test_budget_that_holds_next_to_nothing(points):
    store = EmbeddingStore(GreedyCoreset(progress=False), expected_rows=len(points), budget=1000)
    with pytest.raises(ValueError, match=r"memory budget of .* holds 8 patch embeddings.*Raise memory_budget to at least"):
        fill(store, points)


COST = RowCost(columns=12, value_bytes=4, bank_share=0.01, projected=False)


def test_next_to_no_free_memory():
    with pytest.raises(ValueError, match=r"free memory, of which .* holds 6 patch embeddings.*Free at least .* GiB, or use"):
        plan_memory(COST, 12_000, budget=None, free=1000)


@pytest.mark.parametrize(
    ("expected", "budget", "level", "text"),
    [
        (2000, None, logging.INFO, "Collecting 2000 patch embeddings of 12 values.* will be exact"),
        (12_000, None, logging.WARNING, "12000 patch embeddings of 12 values do not fit"),
        (12_000, bytes_for(3000, 12), logging.INFO, "12000 patch embeddings of 12 values do not fit"),
        (None, None, logging.INFO, "number of patch embeddings is not known"),
    ],
)
def test_what_a_plan_means_is_said(caplog, expected, budget, level, text):
    """As a warning only where the user set no budget, and so did not ask for a streamed fit."""
    plan = plan_memory(COST, expected, budget=budget, free=bytes_for(3000, 12) / 0.8)
    with caplog.at_level(logging.INFO):
        plan.log(logging.getLogger(__name__))
    (record,) = caplog.records
    assert record.levelno == level
    assert re.search(text, record.message)


def test_plan_takes_most_of_the_free_memory_or_the_budget():
    plans = [plan_memory(COST, None, budget=budget, free=1e8).rows for budget in (None, 1e8, 1e7)]
    assert plans[0] == pytest.approx(0.8 * plans[1], abs=1)
    assert plans[2] == pytest.approx(0.1 * plans[1], abs=1)


@pytest.mark.parametrize("expected", [0, 1])
def test_expectation_far_too_low(points, expected):
    store = EmbeddingStore(GreedyCoreset(size=100, progress=False), expected_rows=expected)
    assert len(fill(store, points).reduce_to_bank()) == 100


def test_memory_of_a_container(tmp_path):
    """What it may still take is its limit less its use, of which cached files give way."""
    for name, text in {"memory.max": "3000000", "memory.current": "2500000"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 300000\ninactive_file 1000000\nfile 9\n")
    files = [("/no/such/limit", "/no/such/use"), (tmp_path / "memory.max", tmp_path / "memory.current")]
    cpu = torch.device("cpu")
    assert free_memory(cpu, container_files=files) == 1_800_000
    assert free_memory(cpu, processes=2, container_files=files) == 900_000
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(cpu, container_files=files) > 10_000_000


def test_nothing_collected():
    with pytest.raises(ValueError, match="no embeddings"):
        EmbeddingStore(GreedyCoreset()).reduce_to_bank()


def test_other_width(points):
    store = fill(EmbeddingStore(GreedyCoreset()), points)
    with pytest.raises(ValueError, match="Embeddings of 3 values do not go with those of 12"):
        store.append(torch.zeros(4, 3))


def test_free_memory_is_shared_by_processes():
    import psutil

    available = psutil.virtual_memory().available
    for processes in (1, 4):
        free = free_memory(torch.device("cpu"), processes, container_files=())
        assert free == pytest.approx(available / processes, rel=0.2)


def test_last_step_picks_as_the_sampler_does(points):
    """Every argument of the sampler counts, the projection too."""
    wide = np.random.default_rng(0).normal(size=(1500, 600)).astype(np.float32)
    sampler = GreedyCoreset(size=40, progress=False, random_state=3, projection=0.9)
    store = fill(EmbeddingStore(sampler, budget=2**26), wide)
    assert torch.equal(store.reduce_to_bank(), torch.from_numpy(wide)[sampler.fit(wide)])
    exact = GreedyCoreset(size=40, progress=False, random_state=3).fit(wide)
    assert not torch.equal(store.numbers_, exact)
