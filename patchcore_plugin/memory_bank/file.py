"""The files of a memory bank: a FAISS index, and the neighbours of its vectors beside it.

A file that a user hands over may be damaged or made to harm: FAISS checks little of what it reads, so all that a search
relies on is checked here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import faiss
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import IndexKind

LARGEST = 1e16
"""Greatest value of a vector: the sum of a few thousand such squares still is a float32."""

STORAGES = {faiss.ScalarQuantizer.QT_fp16: "float16", faiss.ScalarQuantizer.QT_8bit: "int8"}
"""What :class:`patchcore_plugin.memory_bank.MemoryBank` calls FAISS's quantizers."""

_BLOCK_ROWS = 4096
_MAPPED_FROM = 2**28  # bytes; a larger file is mapped into memory rather than read


def write(path: Path, index: faiss.Index, neighbors: NDArray[np.int32] | None) -> None:
    """Write an index, and beside it (``.npy``) the neighbours (M, k) of its vectors, where there are some."""
    draft = path.with_name(f"{path.name}.part")  # a bank may be mapped from the very file that it is saved to
    if str(draft).isascii():
        faiss.write_index(index, str(draft))
    else:  # FAISS opens no other names on every system
        draft.write_bytes(faiss.serialize_index(index).tobytes())
    draft.replace(path)
    beside = path.with_suffix(".npy")
    if neighbors is None:
        beside.unlink(missing_ok=True)  # another bank's
    else:
        np.save(beside, neighbors)


def read(path: Path) -> tuple[faiss.Index, bool, NDArray[np.int32] | None]:
    """Read what :func:`write` wrote: the index, whether it is mapped into memory, as a large one is, and the neighbours.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no L2 index of a kind that a memory bank builds, or holds no finite vectors; or if the
            neighbours are damaged.
    """
    try:
        mapped = path.stat().st_size >= _MAPPED_FROM and str(path).isascii()
        if mapped:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        else:
            index = faiss.deserialize_index(np.frombuffer(path.read_bytes(), np.uint8))
    except (RuntimeError, MemoryError) as error:
        msg = f"{path} is not a readable FAISS index (truncated or damaged)."
        raise ValueError(msg) from error
    if kind(index) is None:
        msg = f"{path} holds a {type(index).__name__}; a memory bank is a flat, IVF or HNSW L2 index of plain vectors."
        raise ValueError(msg)
    size = index.ntotal
    if not size:
        msg = f"{path} holds an empty memory bank."
        raise ValueError(msg)
    if isinstance(index, faiss.IndexIVF):
        _map_directly(index, path)
    for start in range(0, size, _BLOCK_ROWS):
        if not (np.abs(index.reconstruct_n(start, min(_BLOCK_ROWS, size - start))) < LARGEST).all():
            msg = f"{path} holds NaN or infinite values, or values too large for float32 distances."
            raise ValueError(msg)
    beside = path.with_suffix(".npy")
    return index, mapped, _read_neighbors(beside, size) if beside.is_file() else None


def storage(index: faiss.Index) -> faiss.Index:
    """The index itself, or what a graph's vectors are stored in."""
    return faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index


def kind(index: faiss.Index) -> IndexKind | None:
    """What :class:`MemoryBank` calls an index of FAISS; None for one that it would not build."""
    if index.metric_type != faiss.METRIC_L2:
        return None
    if isinstance(index, faiss.IndexIVF):
        plain = isinstance(index, faiss.IndexIVFFlat) or (
            isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype in STORAGES and not index.by_residual
        )
        return "ivf" if plain and index.quantizer.metric_type == faiss.METRIC_L2 else None
    vectors = storage(index)
    if vectors.metric_type != faiss.METRIC_L2:
        return None
    if not (isinstance(vectors, faiss.IndexFlat) or (_is_quantized(vectors) and vectors.sq.qtype in STORAGES)):
        return None
    if vectors is index:
        return "flat"
    return "hnsw" if vectors.ntotal == index.ntotal and vectors.d == index.d else None


def _is_quantized(index: faiss.Index) -> bool:
    return isinstance(index, faiss.IndexScalarQuantizer)


def _map_directly(index: faiss.IndexIVF, path: Path) -> None:
    """Note where each vector is, whatever the file says of it; a ValueError if one is there twice or not at all."""
    lists = index.invlists
    ids = [faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell)) for cell in range(index.nlist)]
    if not np.array_equal(np.sort(np.concatenate(ids)), np.arange(index.ntotal)):
        msg = f"{path} is damaged: its cells do not hold each of its {index.ntotal} vectors once."
        raise ValueError(msg)
    index.set_direct_map_type(faiss.DirectMap.NoMap)
    index.make_direct_map()


def _read_neighbors(path: Path, size: int) -> NDArray[np.int32]:
    try:
        with path.open("rb") as file:
            neighbors = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        msg = f"{path} is damaged: {error}"
        raise ValueError(msg) from error
    if neighbors.dtype != np.int32 or neighbors.ndim != 2 or len(neighbors) != size or not neighbors.shape[1]:
        msg = f"{path} holds {neighbors.dtype} values of shape {neighbors.shape}, not neighbours of {size} vectors."
        raise ValueError(msg)
    if neighbors.min() < 0 or neighbors.max() >= size or (neighbors[:, 0] != np.arange(size)).any():
        msg = f"{path} does not hold neighbours of the bank's vectors, each of them first among its own."
        raise ValueError(msg)
    return neighbors
