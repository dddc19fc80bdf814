"""Vectors of a coreset without likes in other images, against a slow float64 reference."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.embedding_store import EmbeddingStore
from patchcore_plugin.coreset.outliers import MIN_IMAGES, find_outliers


def second_distances(bank: np.ndarray, bank_images: np.ndarray, rows: np.ndarray, row_images: np.ndarray) -> np.ndarray:
    """Distance of each vector to the second nearest other image, one vector and one image at a time."""
    distances = cdist(bank.astype(np.float64), rows.astype(np.float64))
    found = []
    for number, image in enumerate(bank_images):
        others = [distances[number, row_images == other].min() for other in np.unique(row_images) if other != image]
        found.append(sorted(others)[1])
    return np.array(found)


def limit_of(distances: np.ndarray, deviations: float) -> float:
    """Median and standard deviations above it; the deviation is estimated from the median absolute one."""
    middle = np.sort(distances)[(len(distances) - 1) // 2]
    spread = np.sort(np.abs(distances - middle))[(len(distances) - 1) // 2] / 0.6745
    return middle + deviations * max(spread, 0.1 * middle)


def find(bank, bank_images, rows, row_images, deviations=2.0):
    tensors = [torch.from_numpy(array) for array in (bank, bank_images, rows, row_images)]
    return find_outliers(*tensors, deviations).numpy()


def data(seed: int = 0, images: int = 15, each: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in clusters that all images share, their images, and numbers of rows to make the bank of."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(8, 12)) * 4
    rows = centers[rng.integers(0, 8, images * each)] + rng.normal(size=(images * each, 12))
    rows, numbers = rows.astype(np.float32), np.repeat(np.arange(images), each)
    return rows, numbers, rng.permutation(len(rows))[:200]


@pytest.mark.parametrize("deviations", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_as_the_reference(seed, deviations):
    rows, images, picks = data(seed)
    truth = second_distances(rows[picks], images[picks], rows, images)
    found = find(rows[picks], images[picks], rows, images, deviations)
    np.testing.assert_array_equal(found, truth > limit_of(truth, deviations))
    if deviations == 0.5:
        assert 20 < found.sum() < 120


def test_only_the_pilot_sets_the_limit_of_many_vectors():
    rows, images, _ = data(images=12, each=450)
    picks = np.arange(5400)
    pilot = np.linspace(0, 5399, 4096).astype(int)
    truth = second_distances(rows, images, rows, images)
    found = find(rows[picks], images[picks], rows, images)
    np.testing.assert_array_equal(found, truth > limit_of(truth[pilot], 2))


def test_a_defect_that_two_images_share_is_found_and_one_of_three_is_not():
    rows, images, picks = data()
    for shared, expected in ((2, True), (3, False)):
        changed = rows.copy()
        odd = [np.flatnonzero(images == image)[0] for image in range(shared)]
        changed[odd] = changed.mean(0) + 40
        bank = np.append(np.setdiff1d(picks, odd), odd)
        assert (find(changed[bank], images[bank], changed, images)[-shared:] == expected).all()


def test_the_like_patches_of_the_own_image_do_not_count():
    rows, images, picks = data()
    own = np.flatnonzero(images == 3)
    rows[own[:40]] = 50
    bank = np.append(np.setdiff1d(picks, own), own[:1])
    assert find(rows[bank], images[bank], rows, images)[-1]


def test_an_image_whose_rows_come_in_several_parts_is_one():
    rows, images, picks = data()
    order = np.random.default_rng(1).permutation(len(rows))
    np.testing.assert_array_equal(
        find(rows[picks], images[picks], rows[order], images[order]), find(rows[picks], images[picks], rows, images)
    )


def test_few_images_and_copies_leave_nothing_out():
    rows, images, picks = data(images=MIN_IMAGES - 1)
    picks = picks[picks < len(rows)]
    assert not find(rows[picks], images[picks], rows, images, 0.5).any()
    once = np.tile(rows[images == 0], (15, 1))
    numbers = np.repeat(np.arange(15), 60)
    assert not find(once, numbers, once, numbers, 0.5).any()
    # two thirds of the images are copies of one, the others are like one another: nothing tells what is usual
    rows, images, _ = data()
    rows[images < 10] = np.tile(rows[images == 0], (10, 1))
    assert not find(rows, images, rows, images, 0.5).any()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(10, 16), st.integers(1, 8), st.floats(0.1, 4), st.sampled_from([1e-3, 1, 1e3]))
def test_any_small_set(seed, count, columns, deviations, scale):
    rng = np.random.default_rng(seed)
    images = np.sort(np.concatenate([np.arange(count), rng.integers(0, count, 80)]))
    rows = (rng.normal(size=(len(images), columns)) * scale).astype(np.float32)
    picks = rng.permutation(len(rows))[: rng.integers(1, len(rows))]
    truth = second_distances(rows[picks], images[picks], rows, images)
    limit = limit_of(truth, deviations)
    clear = np.abs(truth - limit) > 1e-3 * scale  # float32 decides the others
    found = find(rows[picks], images[picks], rows, images, deviations)
    np.testing.assert_array_equal(found[clear], (truth > limit)[clear])


def work(rank: int, folder: str, cut: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows, images, picks = (torch.from_numpy(array) for array in data())
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    found = find_outliers(rows[picks], images[picks], rows[mine], images[mine], 1.0, dist.group.WORLD)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("cut", [420, 450, 900])
def test_two_processes_find_what_one_finds(tmp_path, cut):
    """Also where an image's rows are in both, and where one process has none."""
    rows, images, picks = data()
    expected = find(rows[picks], images[picks], rows, images, 1.0)
    assert expected.any()
    multiprocessing.spawn(work, args=(str(tmp_path), cut), nprocs=2)
    for rank in range(2):
        np.testing.assert_array_equal(torch.load(tmp_path / f"{rank}.pt").numpy(), expected)


@pytest.mark.parametrize("budget", [2**26, 15 * 1000 * 200 / 6], ids=["all at once", "streamed"])
def test_store_leaves_out_what_is_found(budget):
    rows, images, _ = data(each=1000)
    odd = np.random.default_rng(2).permutation(len(rows))[:20]
    rows[odd] += np.random.default_rng(3).normal(size=(20, 12)).astype(np.float32) * 30
    store = EmbeddingStore(GreedyCoreset(ratio=0.02, progress=False), expected_rows=len(rows), budget=budget)
    for part in torch.from_numpy(rows).split(700):
        store.append(part)
    of_row = torch.from_numpy(images)
    bank = store.reduce_to_bank(find_outliers=lambda b, n, r, m: find_outliers(b, of_row[n], r, of_row[m], 3.0))
    assert bool(store.reductions) == (budget < 2**26)
    assert torch.equal(torch.from_numpy(rows)[store.numbers_], bank)
    assert not np.isin(odd, store.numbers_).any()
    assert 200 < len(bank) <= 280
