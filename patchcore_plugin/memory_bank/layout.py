"""The layout of a FAISS index file, checked before FAISS reads the file.

FAISS reads many kinds of index, some of which open further files, and it checks little of what it reads. So a file is read
here first, value by value, as one that a memory bank has written. Each kind of index checks what it relies on
(:meth:`patchcore_plugin.memory_bank.faiss_index.FaissIndex.check_file`).

Source of the layout: ``write_index`` in FAISS's ``impl/index_write.cpp``. Numbers are little-endian.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import faiss
import numpy as np

from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from mmap import mmap

    from numpy.typing import NDArray

VALUE_LIMIT = 1e16
"""Bound of a vector's values: the sum of a few thousand squares of smaller values is still a float32 number."""

VECTORS_LIMIT = 2**31
"""Bound of the number of vectors: neighbors are int32."""

_DIMENSION_LIMIT = 2**20
_AXIS_LIMIT = 1.001  # of each value of an axis of length 1
_BROKEN_GRAPH = "its graph leads to vectors that are not there"
# Bytes of a vector's code, and trained numbers, for each of its values.
_QUANTIZERS = {faiss.ScalarQuantizer.QT_fp16: (2, 0), faiss.ScalarQuantizer.QT_8bit: (1, 2)}


class Header(NamedTuple):
    """How the part of a file begins that holds an index.

    Attributes:
        magic: FAISS's four letters of the type of index.
        dimension: Number D of values of a vector.
        count: Number M of vectors.
    """

    magic: bytes
    dimension: int
    count: int


class IndexFile:
    """Reads the values of a file one after the other, and none beyond its end.

    Args:
        data: Content of the file.
    """

    def __init__(self, data: bytes | mmap) -> None:
        self._data, self._position = data, 0

    def numbers(self, layout: str) -> tuple:
        """Read numbers.

        Args:
            layout: Types of the numbers, as of :mod:`struct`.

        Raises:
            UsageError: If the file is shorter.
        """
        layout = f"<{layout}"
        start = self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def array(self, dtype: str, count: int | None = None) -> NDArray:
        """Read an array (N,), of which nothing is copied.

        Args:
            dtype: Type of its values.
            count: Number N of values; None reads the number first.

        Raises:
            UsageError: If the file is shorter.
        """
        count = self.numbers("Q")[0] if count is None else count
        start = self._skip(count * np.dtype(dtype).itemsize)
        return np.frombuffer(self._data, dtype, count, start)

    def header(self) -> Header:
        """Read the header of an index.

        Raises:
            UsageError: If the index is not trained, has another metric than L2, or an impossible size.
        """
        magic, dimension, count, _, _, trained, metric = self.numbers("4siqqqBi")
        check(trained == 1 and metric == faiss.METRIC_L2, "it is not a trained index of metric L2")
        check(1 <= dimension <= _DIMENSION_LIMIT, f"a vector has {dimension} values")
        check(0 <= count < VECTORS_LIMIT, f"it has {count} vectors")
        return Header(magic, dimension, count)

    def vectors(self, header: Header) -> NDArray[np.float32]:
        """Read the vectors of a flat index (M, D), float32, which are the rest of it.

        Raises:
            UsageError: If the number of values is not that of the header.
        """
        values = self.array("<f4")
        expected = header.count * header.dimension
        check(len(values) == expected, f"it has {len(values)} values, and its header says {expected}")
        return values.reshape(header.count, header.dimension)

    def quantizer(self, header: Header) -> int:
        """Read the scalar quantizer of an index.

        Returns:
            Bytes of a vector's code.

        Raises:
            UsageError: If a bank has no such quantizer, or its ranges are not finite.
        """
        kind, _, _, dimension, code_bytes = self.numbers("iifQQ")
        ranges = self.array("<f4")
        check(kind in _QUANTIZERS, f"a bank has no quantizer of type {kind}")
        size, trained = (each * header.dimension for each in _QUANTIZERS[kind])
        fits = (dimension, code_bytes, len(ranges)) == (header.dimension, size, trained)
        check(fits, "its quantizer is not one of its vectors")
        check(is_finite(ranges) and (ranges[header.dimension :] >= 0).all(), "the ranges of its quantizer are not finite")
        return size

    def codes(self, header: Header) -> None:
        """Read the quantizer and the codes of the vectors, which are the rest of an index.

        Raises:
            UsageError: If the number of codes is not that of the header.
        """
        size = self.quantizer(header)
        found, expected = len(self.array("u1")), header.count * size
        check(found == expected, f"its codes have {found} bytes, and its header says {expected}")

    def check_end(self) -> None:
        """Check that nothing is left to read.

        Raises:
            UsageError: If something is.
        """
        left = len(self._data) - self._position
        check(not left, f"{left} bytes follow the index")

    def _skip(self, size: int) -> int:
        """Go on by a number of bytes; returns where they start."""
        start, self._position = self._position, self._position + size
        check(self._position <= len(self._data), "it ends too early")
        return start


def check(holds: bool | np.bool, reason: str) -> None:
    """Refuse a file in which something does not hold.

    Args:
        holds: Whether it holds.
        reason: What is wrong with the file otherwise.

    Raises:
        UsageError: If it does not hold.
    """
    if not holds:
        raise UsageError(reason)


def is_finite(values: NDArray[np.floating]) -> bool:
    """Whether the values are numbers below :data:`VALUE_LIMIT`."""
    return bool(values.min(initial=0) > -VALUE_LIMIT and values.max(initial=0) < VALUE_LIMIT)  # NaN is neither


def check_graph(file: IndexFile, header: Header) -> None:
    """Read the graph of an HNSW index, whose every search stays within it.

    Raises:
        UsageError: If a search could leave it.
    """
    file.array("<f8")  # probabilities of levels, for vectors that are added
    starts, levels = file.array("<i4"), file.array("<i4")
    offsets, neighbors = file.array("<u8"), file.array("<i4")
    entry, top, *widths = file.numbers("5i")
    count = header.count
    check(len(starts) >= 2 and starts[0] == 0 and (np.diff(starts.astype(np.int64)) >= 0).all(), _BROKEN_GRAPH)
    check(len(levels) == count and len(offsets) == count + 1 and min(widths) > 0, _BROKEN_GRAPH)
    check(count > 0 and levels.min() >= 1 and levels.max() < len(starts), _BROKEN_GRAPH)
    check(offsets[0] == 0 and offsets[-1] == len(neighbors), _BROKEN_GRAPH)
    check((offsets[1:] - offsets[:-1] == starts[levels].astype(np.uint64)).all(), _BROKEN_GRAPH)
    check(len(neighbors) == 0 or (neighbors.min() >= -1 and neighbors.max() < count), _BROKEN_GRAPH)
    check(0 <= entry < count and top == levels[entry] - 1, _BROKEN_GRAPH)
    for level in range(1, int(levels.max())):  # on each level, a vector's neighbors are on that level too
        rows = offsets[np.flatnonzero(levels > level)].astype(np.int64)
        found = neighbors[rows[:, None] + np.arange(starts[level], starts[level + 1])]
        check((levels[found[found >= 0]] > level).all(), _BROKEN_GRAPH)


def check_projection(file: IndexFile, dimension: int) -> int:
    """Read the only step of an index of transformed vectors, a linear projection without a shift.

    Args:
        file: The file, read up to the end of the index's header.
        dimension: Number of values of a vector.

    Returns:
        Number of values of a projected vector.

    Raises:
        UsageError: If it is something else, or not finite.
    """
    steps, magic, shifted = file.numbers("i4sB")
    check((steps, magic, shifted) == (1, b"LTra", 0), "its vectors are transformed otherwise than by a projection")
    factors, shifts = file.array("<f4"), file.array("<f4")
    columns, rows, trained = file.numbers("iiB")
    fits = (columns, len(factors), len(shifts), trained) == (dimension, rows * columns, 0, 1)
    check(fits and 1 <= rows <= columns, "its projection is not one of its vectors")
    check(bool((np.abs(factors) <= _AXIS_LIMIT).all()), "its projection is not along axes of length 1")
    return rows


def check_lists(file: IndexFile, header: Header, cells: int, code_bytes: int) -> None:
    """Read the inverted lists of an IVF index, which hold each vector once.

    Args:
        file: The file.
        header: Header of the index.
        cells: Number of lists.
        code_bytes: Bytes of a vector's code.

    Raises:
        UsageError: If they do not.
    """
    magic, count, size, form = file.numbers("4sQQ4s")
    check((magic, count, size) == (b"ilar", cells, code_bytes), "its lists are not those of its cells")
    sizes = file.array("<u8")
    if form == b"sprs":  # pairs of a list and its size, for lists that are not empty
        pairs = sizes.reshape(-1, 2) if len(sizes) % 2 == 0 else sizes[:0]
        check(len(pairs) > 0 and pairs[:, 0].max() < cells, "its lists are not those of its cells")
        sizes = np.zeros(cells, np.uint64)
        sizes[pairs[:, 0]] = pairs[:, 1]
    else:
        check(form == b"full" and len(sizes) == cells, "its lists are not those of its cells")
    ids = []
    for length in sizes.tolist():
        check(length <= header.count, "a list has more vectors than the index")
        file.array("u1", length * code_bytes)
        ids.append(file.array("<i8", length))
    once = np.array_equal(np.sort(np.concatenate(ids)), np.arange(header.count))
    check(once, f"its cells do not hold each of its {header.count} vectors once")
