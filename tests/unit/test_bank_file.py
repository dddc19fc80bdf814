"""Files of a memory bank, sound, damaged and made to harm."""

import os
import re
from typing import get_args

import faiss
import numpy as np
import pytest

from patchcore_plugin.bundle import IndexKind
from patchcore_plugin.memory_bank import MemoryBank

BANKS = [
    ("ivf", "float32"),
    ("hnsw", "float32"),
    ("flat", "float16"),
    ("ivf", "float16"),
    ("hnsw", "int8"),
    ("reduced", "float32"),
    ("reduced", "float16"),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bank.faiss"


def write(path, index: faiss.Index) -> None:
    path.write_bytes(faiss.serialize_index(index).tobytes())


def test_save_and_load(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    path = tmp_path / "bänk.faiss"
    MemoryBank(vectors).save(path)
    loaded = MemoryBank.load(path)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    assert (len(loaded), loaded.dimension) == (50, 7)


@pytest.mark.parametrize(("index", "storage"), [("flat", "float32"), ("bfloat16", "float32"), *BANKS])
def test_every_kind(index, storage, path, real_embeddings):
    bank = MemoryBank(real_embeddings[::20], index, storage, num_neighbors=5)
    bank.save(path)
    loaded = MemoryBank.load(path, index)
    assert (loaded.index, loaded.storage, loaded.width) == (index, storage, bank.width)
    np.testing.assert_array_equal(loaded.vectors, bank.vectors)
    np.testing.assert_array_equal(loaded.neighbors, bank.neighbors)
    for ours, theirs in zip(loaded.search(real_embeddings[:500], 3), bank.search(real_embeddings[:500], 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert MemoryBank.load(path).index == ("flat" if index == "bfloat16" else index)


def test_load_as_another_kind(path):
    vectors = np.random.default_rng(0).normal(size=(50, 7))
    MemoryBank(vectors, "hnsw").save(path)
    for kind in set(get_args(IndexKind)) - {"hnsw"}:
        with pytest.raises(ValueError, match=rf"bank\.faiss is a hnsw index of float32, not one of the kind '{kind}'"):
            MemoryBank.load(path, kind)
    MemoryBank(vectors, storage="float16").save(path)
    with pytest.raises(ValueError, match="is a flat index of float16, not one of the kind 'bfloat16'"):
        MemoryBank.load(path, "bfloat16")


def test_mapped_into_memory(path, real_embeddings):
    bank = MemoryBank(real_embeddings[::10], "hnsw", num_neighbors=3)
    bank.save(path)
    loaded = MemoryBank.load(path, mapped_from=1)
    np.testing.assert_array_equal(loaded.search(real_embeddings[:500])[0], bank.search(real_embeddings[:500])[0])


def test_saved_over_the_file_it_is_mapped_from(path, real_embeddings):
    MemoryBank(real_embeddings[:500], num_neighbors=3).save(path)
    bank = MemoryBank.load(path, mapped_from=1)
    bank.save(path)
    np.testing.assert_array_equal(MemoryBank.load(path, mapped_from=1).vectors, real_embeddings[:500])
    np.testing.assert_array_equal(bank.vectors, real_embeddings[:500])
    assert {file.name for file in path.parent.iterdir()} == {"bank.faiss", "bank.npy"}


def test_no_neighbors_of_another_bank(path, real_embeddings):
    MemoryBank(real_embeddings[:50], num_neighbors=3).save(path)
    MemoryBank(real_embeddings[50:100]).save(path)
    assert MemoryBank.load(path).neighbors is None


@pytest.mark.parametrize("content", [b"", b"not an index", b"IxF2" + b"\xff" * 60])
def test_load_of_something_else(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable FAISS index"):
        MemoryBank.load(path)


def test_load_of_a_truncated_bank(path):
    MemoryBank(np.ones((100, 8))).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable FAISS index"):
        MemoryBank.load(path)


def graph_over_another_metric() -> faiss.Index:
    index = faiss.IndexHNSW(faiss.IndexFlatIP(4), 8)
    index.metric_type = faiss.METRIC_L2
    return index


@pytest.mark.parametrize(
    "index",
    [
        faiss.IndexFlatIP(4),
        faiss.IndexScalarQuantizer(4, faiss.ScalarQuantizer.QT_4bit),
        faiss.IndexIVFFlat(faiss.IndexFlatIP(4), 4, 2),
        faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(4), 4, 2, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2, True),
        faiss.IndexHNSWPQ(4, 2, 8),
        graph_over_another_metric(),
    ],
    ids=lambda index: type(index).__name__,
)
def test_load_of_an_index_that_no_bank_builds(path, index):
    vectors = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    index.train(vectors)
    index.add(vectors)
    write(path, index)
    with pytest.raises(ValueError, match="a memory bank is an L2 index of plain vectors: flat, "):
        MemoryBank.load(path)


def test_load_of_an_empty_or_poisoned_bank(path):
    index = faiss.IndexFlatL2(2)
    write(path, index)
    with pytest.raises(ValueError, match="empty memory bank"):
        MemoryBank.load(path)
    index.add(np.full((1, 2), np.nan, np.float32))
    write(path, index)
    with pytest.raises(ValueError, match="NaN or infinite"):
        MemoryBank.load(path)


def test_cells_whose_ids_are_wrong(path, real_embeddings):
    """The direct map of a file is not trusted, and cells that hold a vector twice are refused."""
    MemoryBank(real_embeddings[:400], "ivf").save(path)
    index = faiss.read_index(str(path))
    wrong = np.random.default_rng(0).permutation(faiss.vector_to_array(index.direct_map.array))
    faiss.copy_array_to_vector(wrong, index.direct_map.array)
    write(path, index)
    assert (faiss.vector_to_array(faiss.read_index(str(path)).direct_map.array) == wrong).all()
    np.testing.assert_array_equal(MemoryBank.load(path).vectors, real_embeddings[:400])

    lists = index.invlists
    cell = next(cell for cell in range(index.nlist) if lists.list_size(cell) > 1)
    ids = faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell))
    ids[0] = ids[1]
    write(path, index)
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable .* do not hold each of its 400 vectors once"):
        MemoryBank.load(path)


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
        lambda path: path.write_bytes(path.read_bytes().replace(b"(30, 3), }", b"(30, 3    ")),  # a tokenizer's error
        lambda path: path.write_bytes(path.read_bytes().replace(b"(30, 3), }", b"((((((((((")),
        lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff\xff" + b"(" * 65535),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
)
def test_damaged_neighbors(path, damage):
    MemoryBank(np.random.default_rng(0).normal(size=(30, 4)), num_neighbors=3).save(path)
    damage(path.with_suffix(".npy"))
    with pytest.raises(ValueError, match=r"bank\.npy"):
        MemoryBank.load(path)


def test_failed_write_leaves_nothing(path, real_embeddings):
    path.mkdir()
    with pytest.raises(OSError, match=r"bank\.faiss"):
        MemoryBank(real_embeddings[:10]).save(path)
    assert [file.name for file in path.parent.iterdir()] == ["bank.faiss"]


def test_unwritable_file_is_named(real_embeddings, tmp_path):
    """FAISS tells of a full disk or an absent folder with its own source file; an OSError names ours."""
    path = tmp_path / "absent" / "bank.faiss"
    with pytest.raises(OSError, match=re.escape(f"{path} cannot be written")):
        MemoryBank(real_embeddings[:10]).save(path)


def random_vectors(size: int, dimension: int = 6) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(size, dimension)).astype(np.float32)


def cells_around(centers: faiss.Index) -> faiss.Index:
    """Seven cells of 60 vectors, whose centers are then replaced."""
    own, vectors = faiss.IndexFlatL2(6), random_vectors(60)
    index = faiss.IndexIVFFlat(own, 6, 7)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    index.quantizer = centers
    index.referenced_objects = [own, centers]
    return index


def centers(size: int, dimension: int = 6, kind: type = faiss.IndexFlatL2) -> faiss.Index:
    index = kind(dimension)
    index.add(random_vectors(max(size, 1), dimension)[:size])
    return index


def graph(change) -> faiss.Index:
    """A graph of 300 vectors, with a change to what FAISS says of it."""
    index = faiss.IndexHNSWFlat(6, 4)
    index.add(random_vectors(300))
    change(index.hnsw)
    return index


def lead_to_a_lower_level(graph: faiss.HNSW) -> None:
    """Let a vector of the second level have a neighbor on it that is on the first level alone."""
    levels, offsets, starts = map(faiss.vector_to_array, (graph.levels, graph.offsets, graph.cum_nneighbor_per_level))
    upper = int(np.flatnonzero(levels > 1)[0])
    neighbors = faiss.rev_swig_ptr(graph.neighbors.data(), graph.neighbors.size())
    neighbors[int(offsets[upper] + starts[1])] = len(levels) - 1
    graph.entry_point, graph.max_level = upper, 1


def change_array(name: str, value: int):
    def change(graph: faiss.HNSW) -> None:
        array = getattr(graph, name)
        values = faiss.vector_to_array(array)
        values[1:] = value
        faiss.copy_array_to_vector(values, array)

    return change


def reduced(change=lambda parts: None, **parts) -> faiss.Index:
    """An index of 300 vectors by their first three values, with a change to its parts, or with others."""
    vectors = random_vectors(300)
    projection, graph, exact = faiss.LinearTransform(6, 3, False), faiss.IndexHNSWFlat(3, 4), faiss.IndexFlatL2(6)
    faiss.copy_array_to_vector(np.eye(3, 6, dtype=np.float32).reshape(-1), projection.A)
    projection.is_trained = True
    graph.add(np.ascontiguousarray(vectors[:, :3]))
    exact.add(vectors)
    own = {"projection": projection, "graph": graph, "exact": exact} | parts
    change(own)
    pipeline = faiss.IndexPreTransform(projection, graph)
    pipeline.chain.clear()
    pipeline.chain.push_back(own["projection"])
    pipeline.index, pipeline.ntotal, pipeline.is_trained = own["graph"], 300, True
    index = faiss.IndexRefine(faiss.IndexFlatL2(6), faiss.IndexFlatL2(6))
    index.base_index, index.refine_index, index.ntotal, index.is_trained = pipeline, own["exact"], 300, True
    index.referenced_objects = [pipeline, *own.values(), projection, graph]
    return index


def change_axes(value: float):
    def change(parts: dict) -> None:
        axes = faiss.vector_to_array(parts["projection"].A)
        axes[4] = value
        faiss.copy_array_to_vector(axes, parts["projection"].A)

    return change


def poison_projected(parts: dict) -> None:
    values = faiss.rev_swig_ptr(faiss.downcast_index(parts["graph"].storage).get_xb(), 900)
    values[100] = np.nan


def shifted() -> faiss.LinearTransform:
    projection = faiss.LinearTransform(6, 3, True)
    faiss.copy_array_to_vector(np.eye(3, 6, dtype=np.float32).reshape(-1), projection.A)
    faiss.copy_array_to_vector(np.zeros(3, np.float32), projection.b)
    projection.is_trained = True
    return projection


def graph_of(size: int, dimension: int) -> faiss.Index:
    index = faiss.IndexHNSWFlat(dimension, 4)
    index.add(random_vectors(size, dimension))
    return index


def test_reduced_index_that_is_sound(path):
    """The parts below are refused for what is wrong with each, not for how they are put together."""
    write(path, reduced())
    bank, vectors = MemoryBank.load(path), random_vectors(300)
    assert bank.index == "reduced"
    np.testing.assert_array_equal(bank.vectors, vectors)
    np.testing.assert_array_equal(bank.search(vectors)[1][:, 0], np.arange(300))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: reduced(change_axes(np.nan)), "not along axes"),
        (lambda: reduced(change_axes(1e9)), "not along axes"),
        (lambda: reduced(poison_projected), "its projected vectors are not finite"),
        (lambda: reduced(projection=shifted()), "transformed otherwise"),
        (lambda: reduced(projection=faiss.PCAMatrix(6, 3)), "transformed otherwise"),
        (lambda: reduced(graph=graph_of(299, 3)), "its graph is not one"),
        (lambda: reduced(graph=graph_of(300, 4)), "its graph is not one"),
        (lambda: reduced(graph=centers(300, 3)), "its graph is not one"),
        (lambda: reduced(exact=centers(299)), "does not hold the vectors that it compares"),
        (lambda: reduced(exact=centers(300, 5)), "does not hold the vectors that it compares"),
        (lambda: reduced(exact=centers(300, 6, faiss.IndexFlatIP)), "metric L2"),
        (lambda: reduced(exact=graph_of(300, 6)), "does not hold the vectors that it compares"),
        (lambda: faiss.IndexRefineFlat(faiss.IndexFlatL2(6)), "it has no projection"),
        (lambda: reduced(lambda parts: setattr(parts["graph"].hnsw, "entry_point", 10**6)), "its graph leads"),
    ],
)
def test_reduced_index_with_another_part(path, make, reason):
    write(path, make())
    with pytest.raises(ValueError, match=rf"bank\.faiss is not a readable FAISS index.*{reason}"):
        MemoryBank.load(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: cells_around(centers(7, 2000)),
        lambda: cells_around(centers(7, 3)),
        lambda: cells_around(centers(0)),
        lambda: cells_around(centers(3)),
        lambda: cells_around(centers(50)),
        lambda: cells_around(centers(7, 6, faiss.IndexFlatIP)),
        lambda: cells_around(graph(lambda graph: None)),
        lambda: graph(lead_to_a_lower_level),
        lambda: graph(lambda graph: setattr(graph, "entry_point", 10**6)),
        lambda: graph(lambda graph: setattr(graph, "max_level", 50)),
        lambda: graph(change_array("offsets", 2**40)),
        lambda: graph(change_array("levels", 1000)),
        lambda: graph(change_array("cum_nneighbor_per_level", 2**30)),
    ],
)
def test_index_whose_search_would_leave_it(path, make):
    """Of these FAISS reads some, and then crashes or finds wrong neighbors."""
    write(path, make())
    with pytest.raises(ValueError, match=r"bank\.faiss is not a readable FAISS index of a memory bank: its? "):
        MemoryBank.load(path)


@pytest.mark.parametrize(("index", "storage"), [("flat", "float32"), *BANKS])
def test_every_number_of_a_header_counts(index, storage, path):
    """A file with other numbers at its beginning is refused, or is a bank that can be searched."""
    MemoryBank(random_vectors(60), index, storage).save(path)
    content, queries = path.read_bytes(), random_vectors(4)
    for place in range(4, 200):
        for value in (0, 1, 127, 255):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                bank = MemoryBank.load(path, index)
            except ValueError:
                continue
            assert (len(bank), bank.dimension) == (60, 6)
            assert (bank.search(queries, 3)[1] >= 0).all()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_pipe(path):
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"bank\.faiss is damaged: it is not a regular file"):
        MemoryBank.load(path)


@pytest.mark.parametrize(("full", "named"), [("bank.faiss.part", "bank.faiss"), ("bank.npy", "bank.npy")])
def test_full_disk_is_told_with_the_file(real_embeddings, tmp_path, full, named):
    """FAISS names its own source file, and NumPy none."""
    (tmp_path / full).symlink_to("/dev/full")
    bank = MemoryBank(real_embeddings[:500])
    bank.find_neighbors(9)
    with pytest.raises(OSError, match=r"cannot be written, with [\d,]+ MiB free|No space left on device") as raised:
        bank.save(tmp_path / "bank.faiss")
    assert str(tmp_path / named) in str(raised.value)
