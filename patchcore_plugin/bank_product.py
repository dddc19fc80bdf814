"""Candidates for the nearest vectors of patches, by one matrix product in bfloat16 on OpenVINO."""

from __future__ import annotations

from contextlib import contextmanager
from queue import Empty, LifoQueue
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from patchcore_plugin.network import compile_options, cores, has_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PARTS = 16
"""Most parts that the bank is divided into: each gives one candidate, and its products stay in a core's cache."""

_ROWS, _COLUMNS = 16, 32  # the matrices' sizes are multiples of these, as products of others are slower by half
_TERMS = 3  # numbers of bfloat16 that add up to one of float32


class Product:
    """The bank's vectors as factors of a product with patches.

    For each patch every vector is looked at, in bfloat16, where the CPU has it: squared distances are wrong by up to a
    percent, so that the nearest vector is among the first few rather than the first.

    Args:
        vectors: Bank vectors (M, D), float32.
        threads: To work on one image with; None leaves an image to one thread, and takes several images at once.
    """

    def __init__(self, vectors: NDArray[np.float32], threads: int | None) -> None:
        self._mean = vectors.mean(0)  # around it vectors are short, and rounding loses little
        self._size, dimension = vectors.shape
        self._rows = _multiple(-(-self._size // PARTS), _ROWS)  # of a part
        parts = -(-self._size // self._rows)
        self._columns = _multiple(dimension + 2 * _TERMS, _COLUMNS)
        # -|x - y|^2 / 2 = x @ y - |x|^2 / 2 - |y|^2 / 2: the squares are further terms of the product.
        factor = np.zeros((parts * self._rows, self._columns), np.float32)
        around = factor[: self._size, :dimension]
        np.subtract(vectors, self._mean, out=around)
        factor[:, dimension : dimension + _TERMS] = 1
        factor[: self._size, dimension + _TERMS : dimension + 2 * _TERMS] = _terms(_halves(around))
        factor[self._size :, dimension + _TERMS] = -1e38  # what fills up the last part is far away
        self._factors = factor.reshape(parts, self._rows, -1)
        self._options = {
            **(compile_options("throughput", cores()) if threads is None else compile_options("latency", threads)),
            "INFERENCE_PRECISION_HINT": "bf16" if has_bfloat16() else "f32",
        }
        self._compiled: dict[tuple[int, int], tuple[ov.CompiledModel, LifoQueue[ov.InferRequest]]] = {}
        self._lock = Lock()

    def candidates(self, queries: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """Indices (N, count) of the vectors that seem nearest to patches (N, D), the nearest first.

        Fewer where the bank has fewer parts. What is computed is compiled for each N, when it is first asked for.
        """
        dimension = len(self._mean)
        patches = np.zeros((len(queries), self._columns), np.float32)
        np.subtract(queries, self._mean, out=patches[:, :dimension])
        patches[:, dimension : dimension + _TERMS] = _terms(_halves(patches[:, :dimension]))
        patches[:, dimension + _TERMS : dimension + 2 * _TERMS] = 1
        with self._request(len(queries), min(count, len(self._factors))) as request:
            found = request.infer([patches], share_inputs=True, share_outputs=True)[0]
            # what was rounded beyond all measure may lead behind the last
            return np.minimum(found, self._size - 1, dtype=np.int64)

    @contextmanager
    def _request(self, rows: int, count: int) -> Iterator[ov.InferRequest]:
        with self._lock:
            if (rows, count) not in self._compiled:
                compiled = ov.Core().compile_model(self._network(rows, count), "CPU", self._options)
                self._compiled[rows, count] = compiled, LifoQueue()
            compiled, idle = self._compiled[rows, count]
        try:
            request = idle.get_nowait()
        except Empty:
            request = compiled.create_infer_request()
        try:
            yield request
        finally:
            idle.put(request)

    def _network(self, rows: int, count: int) -> ov.Model:
        """From patches (N, columns) to candidates (N, count): the best of each part, and the best of those."""
        patches = ops.parameter([rows, self._columns], np.float32)
        values, numbers = [], []
        for part, factor in enumerate(self._factors):
            nearness = ops.matmul(patches, factor, transpose_a=False, transpose_b=True)
            best = ops.topk(nearness, np.int64(1), 1, "max", "none", "i32")
            values.append(best.output(0))
            numbers.append(ops.add(best.output(1), np.int32(part * self._rows)).output(0))
        order = ops.topk(ops.concat(values, 1), np.int64(count), 1, "max", "value", "i32")
        found = ops.gather_elements(ops.concat(numbers, 1), order.output(1), 1)
        return ov.Model([found], [patches], "candidates")


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _halves(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """-|x|^2 / 2 of vectors (N, D)."""
    return np.einsum("nd,nd->n", vectors, vectors) * np.float32(-0.5)


def _terms(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values (N,) as sums of numbers that bfloat16 holds exactly (N, 3)."""
    terms = []
    for _ in range(_TERMS):
        terms.append((values.view(np.uint32) & 0xFFFF0000).view(np.float32))
        values = values - terms[-1]
    return np.stack(terms, 1)
