"""The files of a memory bank: a FAISS index, and beside it the neighbors of its vectors (.npy).

A file may be damaged or made to harm, and FAISS checks little of what it reads. So everything that a search relies on is
checked here; :mod:`patchcore_plugin.memory_bank.layout` looks at a file before FAISS does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import faiss
import numpy as np

from patchcore_plugin.bundle import parse_array
from patchcore_plugin.cpu import outside_fork
from patchcore_plugin.errors import UsageError, writing
from patchcore_plugin.memory_bank.indexes import KINDS
from patchcore_plugin.memory_bank.layout import IndexFile, check, is_finite
from patchcore_plugin.moving import replace

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_plugin.bundle import FileContent, IndexKind
    from patchcore_plugin.memory_bank.faiss_index import FaissIndex

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
    try:
        with writing(path):
            if str(draft).isascii():
                faiss.write_index(index, str(draft))
            else:  # not every system lets FAISS open such a name
                draft.write_bytes(faiss.serialize_index(index).tobytes())
        replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    beside = path.with_suffix(".npy")
    if neighbors is None:
        beside.unlink(missing_ok=True)  # the neighbors in it belong to another bank
    else:
        with writing(beside):
            np.save(beside, neighbors)


def read_bank(
    file: FileContent, neighbors: FileContent | None = None, kind: IndexKind | None = None
) -> tuple[FaissIndex, NDArray[np.int32] | None]:
    """Read the files that :func:`write_bank` wrote.

    Args:
        file: Content of the file of the index.
        neighbors: Content of the file of neighbors; None without one.
        kind: Kind of index to search the file as; None takes the first kind that recognizes the file.

    Returns:
        The index, and the neighbors of its vectors (M, k), int32; None without a file of neighbors.

    Raises:
        UsageError: If a file does not hold what a memory bank writes.
        BundleError: If the file of neighbors is damaged.
    """
    path = file.path
    try:
        _check_layout(file)
        index = _recognized(_read_index(file), kind, path)
    except (RuntimeError, MemoryError) as error:  # FAISS's
        msg = f"{path} is not a readable FAISS index of a memory bank: {error}"
        raise UsageError(msg) from error
    size = index.faiss.ntotal
    for start in range(0, size, _BLOCK_ROWS):
        if not is_finite(outside_fork(index.faiss.reconstruct_n, start, min(_BLOCK_ROWS, size - start))):
            msg = f"{path} holds NaN or infinite values, or values too large for float32 distances."
            raise UsageError(msg)
    return index, None if neighbors is None else _read_neighbors(neighbors, size)


def _check_layout(content: FileContent) -> None:
    """Check that a file holds an index that a memory bank writes, and all of it, before FAISS reads the file."""
    try:
        file = IndexFile(content.data)
        header = file.header()
        kind = next((kind for kind in KINDS.values() if header.magic in kind.magics), None)
        check(kind is not None, "it is none of these kinds")
        kind.check_file(file, header)
        file.check_end()
    except UsageError as error:
        msg = (
            f"{content.path} is not a readable FAISS index of a memory bank: {error}. It is damaged, or of another kind; a "
            f"memory bank is an L2 index of plain vectors: {', '.join(KINDS)}."
        )
        raise UsageError(msg) from error


def _read_index(file: FileContent) -> faiss.Index:
    data = np.frombuffer(file.data, np.uint8)
    if isinstance(file.data, bytes):
        return faiss.deserialize_index(data)
    index = faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(data), len(data)))
    index.referenced_objects = [data]  # whose memory the index uses
    return index


def _recognized(index: faiss.Index, kind: IndexKind | None, path: Path) -> FaissIndex:
    """The index as one of a memory bank."""
    found = next(known for known in KINDS.values() if known.recognize(index))
    if not index.ntotal:
        msg = f"{path} holds an empty memory bank."
        raise UsageError(msg)
    wanted = found if kind is None else KINDS[kind]
    if not wanted.recognize(index):
        msg = f"{path} is a {found.kind} index of {found.recognize(index)}, not one of the kind {kind!r}."
        raise UsageError(msg)
    return wanted(index)


def _read_neighbors(file: FileContent, size: int) -> NDArray[np.int32]:
    neighbors, path = parse_array(file), file.path
    if neighbors.dtype != np.int32 or neighbors.ndim != 2 or len(neighbors) != size or not neighbors.shape[1]:
        msg = f"{path} holds {neighbors.dtype} values of shape {neighbors.shape}, not neighbors of {size} vectors."
        raise UsageError(msg)
    if neighbors.min() < 0 or neighbors.max() >= size or (neighbors[:, 0] != np.arange(size)).any():
        msg = f"{path} does not hold neighbors of the bank's vectors, each vector the first among its own."
        raise UsageError(msg)
    return neighbors
