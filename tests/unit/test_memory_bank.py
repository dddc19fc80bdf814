"""FAISS bank against brute force in float64."""

import gc

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.scoring import ScoreRule


def reference(queries, vectors, k):
    distances = np.sqrt(((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2))
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, axis=1), indices


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 80),
    columns=st.integers(1, 40),
    queries=st.integers(0, 60),
    k=st.integers(1, 12),
)
def test_search(seed, size, columns, queries, k):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(size, columns)).astype(np.float32)
    asked = rng.normal(size=(queries, columns)).astype(np.float32)
    distances, indices = MemoryBank(vectors).search(asked, k)
    expected, _ = reference(asked, vectors, min(k, size))
    assert distances.shape == indices.shape == (queries, min(k, size))
    assert distances.dtype == np.float32
    assert indices.dtype == np.int64
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(((asked[:, None] - vectors[indices]) ** 2).sum(2)), distances, rtol=1e-5, atol=1e-6)


def test_search_of_many_queries():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32)
    asked = rng.normal(size=(9001, 16)).astype(np.float32)
    distances, indices = MemoryBank(vectors).search(asked, 3)
    expected, nearest = reference(asked, vectors, 3)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert (indices == nearest).mean() > 0.999


def test_distances_keep_their_digits_far_from_the_origin():
    """A patch of the bank is at distance 0 from it, which the expansion of the square would not give."""
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 64)) + 100).astype(np.float32)
    distances, _ = MemoryBank(vectors).search(vectors)
    assert (distances == 0).all()


def test_real_embeddings(real_embeddings):
    bank = MemoryBank(real_embeddings[::50])
    distances, _ = bank.search(real_embeddings[:2000], 9)
    expected, _ = reference(real_embeddings[:2000], real_embeddings[::50], 9)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-4)


def test_save_and_load(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    path = tmp_path / "bänk.faiss"
    MemoryBank(vectors).save(path)
    loaded = MemoryBank.load(path)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    assert (len(loaded), loaded.dimension) == (50, 7)


def test_vectors_outlive_the_bank():
    vectors = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float32)
    view = MemoryBank(vectors).vectors
    gc.collect()
    np.testing.assert_array_equal(view, vectors)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.empty((0, 3)), "empty"),
        (np.zeros(3), r"matrix \(N, D\)"),
        (np.zeros((3, 0)), r"matrix \(N, D\)"),
        (np.array([[np.nan, 1]]), "NaN"),
        (np.array([[1e300, 1]]), "NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_vectors(vectors, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(vectors)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros((2, 4)), 1, "queries have 4 values each, the memory bank's vectors 3"),
        (np.full((2, 3), np.inf), 1, "NaN or infinite"),
        (np.zeros((2, 3)), 0, "k must be at least 1"),
    ],
)
def test_bad_queries(queries, k, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(np.zeros((5, 3))).search(queries, k)


@pytest.mark.parametrize("content", [b"", b"not an index", b"IxF2" + b"\xff" * 60])
def test_load_of_something_else(tmp_path, content):
    path = tmp_path / "bank.faiss"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable FAISS index"):
        MemoryBank.load(path)


def test_load_of_a_truncated_bank(tmp_path):
    path = tmp_path / "bank.faiss"
    MemoryBank(np.ones((100, 8))).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable FAISS index"):
        MemoryBank.load(path)


def test_load_of_another_kind_of_index(tmp_path):
    path = tmp_path / "bank.faiss"
    path.write_bytes(faiss.serialize_index(faiss.IndexFlatIP(4)).tobytes())
    with pytest.raises(ValueError, match="a memory bank is a flat, IVF or HNSW L2 index"):
        MemoryBank.load(path)


def test_load_of_an_empty_or_poisoned_bank(tmp_path):
    path = tmp_path / "bank.faiss"
    index = faiss.IndexFlatL2(2)
    path.write_bytes(faiss.serialize_index(index).tobytes())
    with pytest.raises(ValueError, match="empty memory bank"):
        MemoryBank.load(path)
    index.add(np.full((1, 2), np.nan, np.float32))
    path.write_bytes(faiss.serialize_index(index).tobytes())
    with pytest.raises(ValueError, match="NaN or infinite"):
        MemoryBank.load(path)


def test_values_too_large_for_float32_distances():
    with pytest.raises(ValueError, match="too large"):
        MemoryBank(np.full((3, 2), 1e25))
    with pytest.raises(ValueError, match="too large"):
        MemoryBank(np.ones((3, 2))).search(np.full((1, 2), 1e25))


KINDS = [("ivf", "float32"), ("hnsw", "float32"), ("flat", "float16"), ("ivf", "float16"), ("hnsw", "int8")]


@pytest.mark.parametrize(("index", "storage"), KINDS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 200),
    columns=st.integers(1, 40),
    kinds=st.integers(1, 200),
    k=st.integers(1, 12),
    width=st.integers(1, 40),
)
def test_other_indexes(index, storage, seed, size, columns, kinds, k, width):
    """Distances are those of the vectors found, in order, whatever is overlooked; duplicates included."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(kinds, columns))[rng.integers(0, kinds, size)].astype(np.float32)
    asked = rng.normal(size=(30, columns)).astype(np.float32)
    bank = MemoryBank(vectors, index, storage, 0 if index == "flat" else width)
    stored = bank.vectors
    np.testing.assert_allclose(stored, vectors, atol={"float32": 0, "float16": 2e-3, "int8": 0.05}[storage])
    distances, indices = bank.search(asked, k)
    assert indices.shape == distances.shape == (30, min(k, size))
    assert ((indices >= 0) & (indices < size)).all()
    assert (np.diff(distances, axis=1) >= 0).all()
    recomputed = np.sqrt(((asked[:, None].astype(np.float64) - stored[indices]) ** 2).sum(2))
    np.testing.assert_allclose(distances, recomputed, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in indices.tolist())


@pytest.mark.parametrize("threads", [None, 2])
@pytest.mark.parametrize(("index", "storage"), [("flat", "float32"), *KINDS])
def test_nearest_of_images(index, storage, threads, bank_vectors, patch_grids):
    """Patches learn from those around them, of their own image only; no distance is another than its vector's."""
    vectors, images = bank_vectors[::2], patch_grids
    queries = images.reshape(-1, images.shape[-1])
    bank = MemoryBank(vectors, index, storage, width=None if index == "flat" else 1)
    bank.threads = threads
    stored = bank.vectors
    exact = np.concatenate([np.linalg.norm(query - stored, axis=1).min(keepdims=True) for query in queries])
    alone, (distances, indices) = bank.search(queries)[0][:, 0], bank.nearest(images)
    assert distances.shape == indices.shape == (len(queries),)
    np.testing.assert_allclose(np.linalg.norm(queries - stored[indices], axis=1), distances, rtol=1e-5)
    assert (distances <= alone).all()
    missed, missed_alone = ((found > exact * (1 + 1e-5)).mean() for found in (distances, alone))
    if index == "flat":
        assert missed == missed_alone == 0
    else:
        assert missed < missed_alone * 0.7
    one_by_one = [np.concatenate(part) for part in zip(*(bank.nearest(image[None]) for image in images), strict=True)]
    np.testing.assert_array_equal(distances, one_by_one[0])
    np.testing.assert_array_equal(indices, one_by_one[1])


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_image_scores_are_exact_where_single_patches_are_overlooked(index, real_embeddings):
    """A narrow search overlooks a few nearest vectors; the farthest patches are searched again."""
    vectors, images = real_embeddings[::3], real_embeddings[1:1025].reshape(4, 16, 16, -1)
    flat, narrow = MemoryBank(vectors), MemoryBank(vectors, index, width=1)
    queries = images.reshape(-1, images.shape[-1])
    exact = flat.search(queries)[0]
    assert (narrow.search(queries)[0] > exact * 1.01).any()
    assert (narrow.search(queries)[0] >= exact * (1 - 1e-6)).all()
    expected, scores = flat.score(images, ScoreRule()), narrow.score(images, ScoreRule())
    np.testing.assert_allclose(scores.image, expected.image, rtol=1e-4)


@pytest.mark.parametrize(("index", "storage"), [("flat", "float32"), *KINDS])
def test_other_indexes_on_disk(index, storage, tmp_path, real_embeddings):
    bank = MemoryBank(real_embeddings[::20], index, storage, num_neighbors=5)
    bank.save(tmp_path / "bank.faiss")
    loaded = MemoryBank.load(tmp_path / "bank.faiss")
    loaded.width = bank.width
    assert (loaded.index, loaded.storage, loaded.width) == (index, storage, bank.width)
    np.testing.assert_array_equal(loaded.vectors, bank.vectors)
    np.testing.assert_array_equal(loaded.neighbors, bank.neighbors)
    for ours, theirs in zip(loaded.search(real_embeddings[:500], 3), bank.search(real_embeddings[:500], 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mapped_into_memory(tmp_path, real_embeddings, monkeypatch):
    bank = MemoryBank(real_embeddings[::10], "hnsw", num_neighbors=3)
    bank.save(tmp_path / "bank.faiss")
    monkeypatch.setattr("patchcore_plugin.memory_bank.file._MAPPED_FROM", 1)
    loaded = MemoryBank.load(tmp_path / "bank.faiss")
    np.testing.assert_array_equal(loaded.search(real_embeddings[:500])[0], bank.search(real_embeddings[:500])[0])
    with pytest.raises(ValueError, match="mapped into memory"):
        loaded.add(real_embeddings[:1])


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_add(index, storage, real_embeddings):
    """A bank that grew answers as one that was built whole."""
    vectors = real_embeddings[::20]
    width = 0 if index == "flat" else 64
    bank = MemoryBank(vectors[:100], index, storage, width, num_neighbors=4)
    bank.add(vectors[100:200])
    bank.add(vectors[200:])
    whole = MemoryBank(vectors, index, storage, width, num_neighbors=4)
    assert len(bank) == len(vectors)
    assert bank.neighbors.shape == (len(vectors), 4)
    tolerance = {"float32": 1e-5, "float16": 1e-3, "int8": 0.2}[storage]  # int8's range is that of the first vectors
    asked = real_embeddings[5:2000:7]
    difference = np.abs(bank.search(asked)[0] - whole.search(asked)[0]) / np.maximum(whole.search(asked)[0], 1e-9)
    assert np.quantile(difference, 0.98) <= tolerance
    with pytest.raises(ValueError, match="vectors have 3 values each"):
        bank.add(np.zeros((2, 3)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 60), kinds=st.integers(1, 60), count=st.integers(1, 12))
def test_neighbors(seed, size, kinds, count):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(kinds, 6))[rng.integers(0, kinds, size)].astype(np.float32)
    found = MemoryBank(vectors, num_neighbors=count).neighbors
    assert found.shape == (size, min(count, size))
    np.testing.assert_array_equal(found[:, 0], np.arange(size))
    expected, _ = reference(vectors, vectors, count)
    distances = np.sqrt(((vectors[:, None].astype(np.float64) - vectors[found]) ** 2).sum(2))
    np.testing.assert_allclose(np.sort(distances, axis=1), expected, atol=1e-3)


@pytest.mark.parametrize("num_neighbors", [1, 5, 9])
def test_scores_do_not_depend_on_neighbours_found_in_advance(num_neighbors, real_embeddings):
    images = real_embeddings[1:1025].reshape(4, 16, 16, -1)
    vectors = real_embeddings[::10]
    expected = MemoryBank(vectors).score(images, ScoreRule(num_neighbors))
    for advance in (5, 9, 12):
        scores = MemoryBank(vectors, num_neighbors=advance).score(images, ScoreRule(num_neighbors))
        np.testing.assert_allclose(scores.image, expected.image, rtol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: np.save(path, np.zeros((30, 3), np.float32)),
        lambda path: np.save(path, np.zeros((29, 3), np.int32)),
        lambda path: np.save(path, np.full((30, 3), 30, np.int32)),
        lambda path: np.save(path, np.full((30, 3), -1, np.int32)),
        lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
        lambda path: np.save(path, np.zeros((30, 3), np.int32)),
        lambda path: np.savez(path.open("wb"), np.zeros((30, 3), np.int32)),
        lambda path: path.write_bytes(path.read_bytes().replace(b"(30, 3)", b"(30, 3000000000)")),
    ],
)
def test_damaged_neighbours(tmp_path, damage):
    MemoryBank(np.random.default_rng(0).normal(size=(30, 4)), num_neighbors=3).save(tmp_path / "bank.faiss")
    damage(tmp_path / "bank.npy")
    with pytest.raises(ValueError, match=r"bank\.npy"):
        MemoryBank.load(tmp_path / "bank.faiss")


def test_wrong_arguments():
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    with pytest.raises(ValueError, match="index must be one of flat, ivf, hnsw; got 'annoy'"):
        MemoryBank(vectors, "annoy")
    with pytest.raises(ValueError, match="storage must be one of float32, float16, int8; got 'int4'"):
        MemoryBank(vectors, storage="int4")
    with pytest.raises(ValueError, match="width must be from 1 to 65,536 for the index 'hnsw' in float32, got 0"):
        MemoryBank(vectors, "hnsw", width=0)


def test_views_survive_growth(real_embeddings):
    bank = MemoryBank(real_embeddings[:50])
    view, before = bank.vectors, bank.vectors.copy()
    bank.add(real_embeddings[50:3000])
    gc.collect()
    np.testing.assert_array_equal(view, before)


def test_saved_over_the_file_it_is_mapped_from(tmp_path, real_embeddings, monkeypatch):
    path = tmp_path / "bank.faiss"
    MemoryBank(real_embeddings[:500], num_neighbors=3).save(path)
    monkeypatch.setattr("patchcore_plugin.memory_bank.file._MAPPED_FROM", 1)
    bank = MemoryBank.load(path)
    bank.save(path)
    np.testing.assert_array_equal(MemoryBank.load(path).vectors, real_embeddings[:500])
    np.testing.assert_array_equal(bank.vectors, real_embeddings[:500])
    assert {file.name for file in tmp_path.iterdir()} == {"bank.faiss", "bank.npy"}


def test_no_neighbours_of_another_bank(tmp_path, real_embeddings):
    path = tmp_path / "bank.faiss"
    MemoryBank(real_embeddings[:50], num_neighbors=3).save(path)
    MemoryBank(real_embeddings[50:100]).save(path)
    assert MemoryBank.load(path).neighbors is None


def test_load_of_a_graph_over_another_metric(tmp_path, real_embeddings):
    storage = faiss.IndexFlatIP(152)
    index = faiss.IndexHNSW(storage, 8)
    index.metric_type = faiss.METRIC_L2
    index.add(real_embeddings[:50])
    faiss.write_index(index, str(tmp_path / "bank.faiss"))
    with pytest.raises(ValueError, match="a memory bank is a flat, IVF or HNSW L2 index"):
        MemoryBank.load(tmp_path / "bank.faiss")


def test_cells_whose_ids_are_wrong(tmp_path, real_embeddings):
    """The direct map of a file is not believed; nor are cells that hold a vector twice."""
    bank = MemoryBank(real_embeddings[:400], "ivf")
    path = tmp_path / "bank.faiss"
    numbers = np.random.default_rng(0).permutation(400)
    faiss.copy_array_to_vector(
        np.array(faiss.vector_to_array(bank._index.direct_map.array)[numbers]), bank._index.direct_map.array
    )
    bank.save(path)
    np.testing.assert_array_equal(MemoryBank.load(path).vectors, real_embeddings[:400])
    index = faiss.read_index(str(path))
    lists = index.invlists
    cell = next(cell for cell in range(index.nlist) if lists.list_size(cell) > 1)
    ids = faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell))
    ids[0] = ids[1]
    faiss.write_index(index, str(path))
    with pytest.raises(ValueError, match="its cells do not hold each of its 400 vectors once"):
        MemoryBank.load(path)


def test_values_too_large_for_float16():
    with pytest.raises(ValueError, match="too large for storage 'float16'"):
        MemoryBank(np.full((3, 2), 70_000.0), storage="float16")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_own_threads(index, threads, real_embeddings):
    bank = MemoryBank(real_embeddings[::10], index, width=4)
    expected = bank.search(real_embeddings[1:2000], 3)
    bank.threads = threads
    for ours, theirs in zip(bank.search(real_embeddings[1:2000], 3), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    bank.threads = None
    assert bank.search(real_embeddings[:5])[0].shape == (5, 1)
