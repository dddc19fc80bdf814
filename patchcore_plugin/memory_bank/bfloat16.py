"""Candidates for the nearest vectors of patches, by one matrix product in bfloat16 on OpenVINO."""

from __future__ import annotations

from contextlib import contextmanager
from queue import Empty, LifoQueue
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from patchcore_plugin.cpu import compile_options, cores, has_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PARTS = 16
"""Most parts that the bank is divided into; each gives one candidate, from products that stay near its core."""

_ROWS, _COLUMNS = 16, 32  # the matrices' sizes are multiples of these, as products of others are slower by half
_TERMS = 3  # numbers of bfloat16 that add up to one of float32


class Product:
    """The bank's vectors as factors of a product with patches.

    For each patch every vector is looked at, in bfloat16, where the CPU has it. The squared distance of x and y is then
    wrong by up to a percent of (|x| + |y|)^2, both measured from the bank's mean: the nearest vector is among the first few
    rather than the first, unless the bank falls into groups that lie much farther apart than patches from it.

    A product takes some twice the memory of its vectors, in float32.

    Args:
        vectors: Bank vectors (M, D), float32.
        count: Candidates for each patch; as many as there are parts at most.
        threads: To work on one image with; None leaves an image to one thread, and takes several images at once.
    """

    def __init__(self, vectors: NDArray[np.float32], count: int, threads: int | None) -> None:
        self._vectors, self._count = vectors, count
        self._mean = vectors.mean(0)  # around it vectors are short, and rounding loses little
        self._columns = _multiple(vectors.shape[1] + 2 * _TERMS, _COLUMNS)
        self._options = {
            **(compile_options("throughput", cores()) if threads is None else compile_options("latency", threads)),
            "INFERENCE_PRECISION_HINT": "bf16" if has_bfloat16() else "f32",
        }
        self._compiled: dict[int, tuple[ov.CompiledModel, LifoQueue[ov.InferRequest]]] = {}
        self._lock = Lock()

    def candidates(self, queries: NDArray[np.float32]) -> NDArray[np.int64]:
        """Indices (N, count) of the vectors that seem nearest to patches (N, D), the nearest first.

        Fewer where the bank has fewer parts. What is computed is compiled for each N, when it is first asked for.
        """
        dimension = len(self._mean)
        patches = np.zeros((len(queries), self._columns), np.float32)
        np.subtract(queries, self._mean, out=patches[:, :dimension])
        patches[:, dimension : dimension + _TERMS] = _terms(_halves(patches[:, :dimension]))
        patches[:, dimension + _TERMS : dimension + 2 * _TERMS] = 1
        with self._request(len(queries)) as request:
            return request.infer([patches], share_inputs=True, share_outputs=True)[0].astype(np.int64)

    @contextmanager
    def _request(self, rows: int) -> Iterator[ov.InferRequest]:
        with self._lock:
            if rows not in self._compiled:
                compiled = ov.Core().compile_model(self._network(rows), "CPU", self._options)
                self._compiled[rows] = compiled, LifoQueue()
            compiled, idle = self._compiled[rows]
        try:
            request = idle.get_nowait()
        except Empty:
            request = compiled.create_infer_request()
        try:
            yield request
        finally:
            idle.put(request)

    def _network(self, rows: int) -> ov.Model:
        """From patches (N, columns) to candidates (N, count): the best of each part, and the best of those."""
        patches = ops.parameter([rows, self._columns], np.float32)
        factors = self._factors()
        values, numbers = [], []
        for part, factor in enumerate(factors):
            nearness = ops.matmul(patches, factor, transpose_a=False, transpose_b=True)
            best = ops.topk(nearness, np.int64(1), 1, "max", "none", "i32")
            values.append(best.output(0))
            numbers.append(ops.add(best.output(1), np.int32(part * len(factor))).output(0))
        count = np.int64(min(self._count, len(factors)))
        order = ops.topk(ops.concat(values, 1), count, 1, "max", "value", "i32")
        found = ops.gather_elements(ops.concat(numbers, 1), order.output(1), 1)
        return ov.Model([found], [patches], "candidates")

    def _factors(self) -> NDArray[np.float32]:
        """The bank in parts (parts, rows, columns), of vectors around the mean and the terms of their squares.

        -|x - y|^2 / 2 = x @ y - |x|^2 / 2 - |y|^2 / 2: the squares are further terms of the product.
        """
        size, dimension = self._vectors.shape
        rows = _multiple(-(-size // PARTS), _ROWS)
        parts = -(-size // rows)
        factors = np.zeros((parts * rows, self._columns), np.float32)
        around = factors[:size, :dimension]
        np.subtract(self._vectors, self._mean, out=around)
        factors[:, dimension : dimension + _TERMS] = 1
        factors[:size, dimension + _TERMS : dimension + 2 * _TERMS] = _terms(_halves(around))
        factors[size:, dimension + _TERMS] = -1e38  # what fills up the last part is far away
        return factors.reshape(parts, rows, -1)


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
