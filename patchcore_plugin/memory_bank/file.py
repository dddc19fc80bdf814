"""The files of a memory bank: a FAISS index, and beside it the neighbors of its vectors (.npy).

A file may be damaged or made to harm, and FAISS checks little of what it reads. So everything that a search relies on is
checked here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import faiss
import numpy as np

from patchcore_plugin.bundle import read_array
from patchcore_plugin.errors import UsageError
from patchcore_plugin.memory_bank.indexes import KINDS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import IndexKind
    from patchcore_plugin.memory_bank.faiss_index import FaissIndex

VALUE_LIMIT = 1e16
"""Bound of a vector's values: the sum of a few thousand squares of smaller values is still a float32 number."""

MAPPED_FILE_BYTES = 2**28
"""Size from which a file is mapped into memory instead of read."""

_BLOCK_ROWS = 4096


def write_bank(path: Path, index: faiss.Index, neighbors: NDArray[np.int32] | None) -> None:
    """Write the files of a memory bank.

    Args:
        path: File of the index.
        index: FAISS index.
        neighbors: Bank indices of the neighbors of each vector (M, k), written to ``path`` with the suffix ``.npy``; None
            removes that file.

    Raises:
        OSError: If a file cannot be written.
    """
    draft = path.with_name(f"{path.name}.part")  # the index may be mapped from the very file that it is written to
    if str(draft).isascii():
        try:
            faiss.write_index(index, str(draft))
        except RuntimeError as error:
            msg = f"{path} cannot be written: {error}"
            raise OSError(msg) from error
    else:  # not every system lets FAISS open such a name
        draft.write_bytes(faiss.serialize_index(index).tobytes())
    draft.replace(path)
    beside = path.with_suffix(".npy")
    if neighbors is None:
        beside.unlink(missing_ok=True)  # the neighbors in it belong to another bank
    else:
        np.save(beside, neighbors)


def read_bank(
    path: Path, kind: IndexKind | None = None, mapped_from: int = MAPPED_FILE_BYTES, *, neighbors: bool = True
) -> tuple[FaissIndex, NDArray[np.int32] | None]:
    """Read the files that :func:`write_bank` wrote.

    Args:
        path: File of the index.
        kind: Kind of index to search the file as; None takes the first kind that recognizes the file.
        mapped_from: Size, in bytes, from which the file is mapped into memory.
        neighbors: Whether to read the file of neighbors too.

    Returns:
        The index, and the neighbors of its vectors (M, k), int32; None without such a file, or where it is not read.

    Raises:
        FileNotFoundError: If there is no file of the index.
        UsageError: If a file does not hold what a memory bank writes.
        BundleError: If the file of neighbors is damaged.
    """
    index = _recognized(_read_index(path, mapped_from), kind, path)
    size = index.faiss.ntotal
    for start in range(0, size, _BLOCK_ROWS):
        if not (np.abs(index.faiss.reconstruct_n(start, min(_BLOCK_ROWS, size - start))) < VALUE_LIMIT).all():
            msg = f"{path} holds NaN or infinite values, or values too large for float32 distances."
            raise UsageError(msg)
    beside = path.with_suffix(".npy")
    return index, _read_neighbors(beside, size) if neighbors and beside.is_file() else None


def _read_index(path: Path, mapped_from: int) -> faiss.Index:
    try:
        if path.stat().st_size >= mapped_from and str(path).isascii():
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        return faiss.deserialize_index(np.frombuffer(path.read_bytes(), np.uint8))
    except (RuntimeError, MemoryError) as error:
        msg = f"{path} is not a readable FAISS index (truncated or damaged)."
        raise UsageError(msg) from error


def _recognized(index: faiss.Index, kind: IndexKind | None, path: Path) -> FaissIndex:
    """The index as one of a memory bank."""
    found = next((known for known in KINDS.values() if known.recognize(index)), None)
    if found is None:
        msg = f"{path} holds a {type(index).__name__}; a memory bank is an L2 index of plain vectors: {', '.join(KINDS)}."
        raise UsageError(msg)
    if not index.ntotal:
        msg = f"{path} holds an empty memory bank."
        raise UsageError(msg)
    wanted = found if kind is None else KINDS[kind]
    if not wanted.recognize(index):
        msg = f"{path} is a {found.kind} index of {found.recognize(index)}, not one of the kind {kind!r}."
        raise UsageError(msg)
    try:
        return wanted(index)
    except UsageError as error:
        msg = f"{path} is damaged: {error}"
        raise UsageError(msg) from error


def _read_neighbors(path: Path, size: int) -> NDArray[np.int32]:
    neighbors = read_array(path)
    if neighbors.dtype != np.int32 or neighbors.ndim != 2 or len(neighbors) != size or not neighbors.shape[1]:
        msg = f"{path} holds {neighbors.dtype} values of shape {neighbors.shape}, not neighbors of {size} vectors."
        raise UsageError(msg)
    if neighbors.min() < 0 or neighbors.max() >= size or (neighbors[:, 0] != np.arange(size)).any():
        msg = f"{path} does not hold neighbors of the bank's vectors, each vector the first among its own."
        raise UsageError(msg)
    return neighbors
