"""The coreset of several processes is that of one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.clusters import ClusterReach
from patchcore_plugin.coreset.embedding_store import EmbeddingStore
from patchcore_plugin.coreset.processes import Shards, rows_of_all
from patchcore_plugin.coreset.tuning import Tuning

# Several rounds, blocks and clusters on small data
SMALL = Tuning(
    block_rows=128, segment_columns=8, padding_columns=16, piece_values=2048, min_candidates=64, pruning_centers=8,
    pruning_batch=1,
)  # fmt: skip


def work(rank: int, folder: str, name: str, world: int) -> None:
    """What one process finds, in a file."""
    torch.set_num_threads(1)
    left_out = []
    within = ClusterReach.within

    def counted(reach, block, centers):
        near = within(reach, block, centers)
        left_out.append(len(centers) - len(near))
        return near

    ClusterReach.within = counted
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    rows = torch.from_numpy(np.load(f"{folder}/{rank}.npy"))
    try:
        if name in ("store", "streamed"):
            budget = {"store": None, "streamed": 1500 * 200}[name]
            sampler = GreedyCoreset(ratio=0.1, progress=False, tuning=SMALL)
            store = EmbeddingStore(sampler, expected_rows=len(rows), budget=budget)
            for part in rows.split(400) if len(rows) else ():
                store.append(part)
            found = {"bank": store.reduce_to_bank(dist.group.WORLD), "radius": store.radius_, "numbers": store.numbers_}
            found["reductions"] = store.reductions
        else:
            projection = 0.9 if name == "projection" else None
            sampler = GreedyCoreset(size=200, progress=False, projection=projection, tuning=SMALL)
            found = {"picks": sampler.fit(rows, dist.group.WORLD), "radius": sampler.radius_}
            found["bank"] = rows_of_all(rows, found["picks"], Shards(dist.group.WORLD), SMALL)
    except ValueError as error:
        found = {"error": str(error)}
    found["left out"] = sum(left_out)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(folder, shards: list[np.ndarray], name: str = "sampler") -> list[dict]:
    """What each of several processes finds."""
    for rank, shard in enumerate(shards):
        np.save(folder / f"{rank}.npy", shard)
    multiprocessing.spawn(work, args=(str(folder), name, len(shards)), nprocs=len(shards))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(shards))]


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(12, 24)) * 4
    return (centers[rng.integers(0, 12, 5000)] + rng.normal(size=(5000, 24))).astype(np.float32)


@pytest.mark.parametrize("cuts", [[2500], [4990], [0], [100, 3000]], ids=str)
def test_same_picks_on_every_process_however_uneven(points, cuts, tmp_path):
    alone = GreedyCoreset(size=200, progress=False)
    picks = alone.fit(points)
    shards = np.split(points, cuts)
    for shard, found in zip(shards, together(tmp_path, shards), strict=True):
        assert torch.equal(found["picks"], picks)
        assert found["left out"] > 100 or len(shard) < 1000  # clusters out of reach of a new center
        assert torch.equal(found["bank"], torch.from_numpy(points)[picks])
        assert found["radius"] == pytest.approx(alone.radius_, rel=1e-12)


def test_ties_across_processes_take_the_lowest_number(tmp_path):
    points = np.random.default_rng(0).integers(0, 4, (3000, 5)).astype(np.float32)
    picks = GreedyCoreset(size=200, progress=False).fit(points)
    for found in together(tmp_path, np.split(points, [700])):
        assert torch.equal(found["picks"], picks)


def test_half_precision(points, tmp_path):
    half = points.astype(np.float16)
    picks = GreedyCoreset(size=200, progress=False).fit(half)
    for found in together(tmp_path, np.split(half, [700])):
        assert torch.equal(found["picks"], picks)


def test_projection(tmp_path):
    points = np.random.default_rng(0).normal(size=(3000, 300)).astype(np.float16)
    alone = GreedyCoreset(size=200, progress=False, projection=0.9)
    picks = alone.fit(points)
    for found in together(tmp_path, np.split(points, [700]), "projection"):
        assert torch.equal(found["picks"], picks)
        assert torch.equal(found["bank"], torch.from_numpy(points)[picks])


def test_bad_values_in_one_process_stop_all(points, tmp_path):
    bad = points.copy()
    bad[4000] = np.nan
    assert ["NaN or infinite" in found["error"] for found in together(tmp_path, np.split(bad, [700]))] == [True, True]


def test_store_of_a_process_without_rows(points, tmp_path):
    store = EmbeddingStore(GreedyCoreset(ratio=0.1, progress=False), expected_rows=len(points))
    store.append(torch.from_numpy(points))
    bank = store.reduce_to_bank()
    for found in together(tmp_path, [points, points[:0]], "store"):
        assert torch.equal(found["bank"], bank)
        assert found["radius"] == pytest.approx(store.radius_)


def test_store_knows_its_rows_through_all_processes(points, tmp_path):
    """Within a budget that one of two processes exceeds: what is left of its rows is numbered as it was appended."""
    shards = np.split(points, [600])
    for found in together(tmp_path, shards, "streamed"):
        assert torch.equal(torch.from_numpy(points)[found["numbers"]], found["bank"])
        assert len(found["numbers"].unique()) == len(found["bank"]) == 500
    assert [torch.load(tmp_path / f"{rank}.pt")["reductions"] > 0 for rank in range(2)] == [False, True]
