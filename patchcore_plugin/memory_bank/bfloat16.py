"""Candidates for the nearest bank vectors of patches, from a matrix product in bfloat16 on OpenVINO."""

from __future__ import annotations

import os
from contextlib import contextmanager
from queue import Empty, LifoQueue
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from patchcore_plugin.cpu import compile_options, cores, has_bfloat16, keep_after_fork

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CANDIDATES_LIMIT = 16
"""Largest number of candidates of a patch: the bank is divided into at most as many parts, and each part gives one."""

_ROWS_MULTIPLE, _COLUMNS_MULTIPLE = 16, 32  # products of matrices of other sizes take up to twice the time
_TERMS = 3  # bfloat16 numbers that add up to one float32 number


class BFloat16Candidates:
    """Approximate distances of patches to all bank vectors, by one matrix product, and the nearest vectors by these.

    The product is computed in bfloat16 where the CPU has it, else in float32. In bfloat16 the squared distance of x and y is
    wrong by up to a percent of (|x| + |y|)^2, both measured from the mean of the bank. So the nearest vector is among the
    first few candidates, unless the bank consists of groups that lie much farther apart than a patch lies from its group.

    The vectors are divided into parts, so that each product stays in the cache of its core. The memory needed is about twice
    that of the vectors in float32.

    Args:
        vectors: Bank vectors (M, D), float32.
        count: Number of candidates of a patch, up to :data:`CANDIDATES_LIMIT`.
        threads: Number of threads that work on one image; None works on an image with one thread, and on several images at
            the same time.

    Attributes:
        count: Number of candidates of a patch.
        threads: Number of threads that work on one image.
        process: Number of the process that made them; OpenVINO's threads do not survive a fork.
    """

    def __init__(self, vectors: NDArray[np.float32], count: int, threads: int | None) -> None:
        self.count, self.threads, self.process = count, threads, os.getpid()
        self._vectors = vectors
        self._mean = vectors.mean(0)  # vectors measured from their mean are short, and lose little by rounding
        self._columns = _next_multiple(vectors.shape[1] + 2 * _TERMS, _COLUMNS_MULTIPLE)
        self._options = {
            **(compile_options("throughput", cores()) if threads is None else compile_options("latency", threads)),
            "INFERENCE_PRECISION_HINT": "bf16" if has_bfloat16() else "f32",
        }
        self._compiled: dict[int, tuple[ov.CompiledModel, LifoQueue[ov.InferRequest]]] = {}
        self._lock = Lock()
        keep_after_fork(self)

    def find(self, queries: NDArray[np.float32]) -> NDArray[np.int64]:
        """Find the candidates of each patch. Safe to call from several threads.

        The first call with N patches compiles the product for N patches.

        Args:
            queries: Patch embeddings (N, D), float32.

        Returns:
            Bank indices (N, count), int64, the seemingly nearest first; fewer than ``count`` where the bank has fewer parts.
        """
        dimension = len(self._mean)
        patches = np.zeros((len(queries), self._columns), np.float32)
        np.subtract(queries, self._mean, out=patches[:, :dimension])
        patches[:, dimension : dimension + _TERMS] = _bfloat16_terms(_minus_half_squares(patches[:, :dimension]))
        patches[:, dimension + _TERMS : dimension + 2 * _TERMS] = 1
        with self._request(len(queries)) as request:
            return request.infer([patches], share_inputs=True, share_outputs=True)[0].astype(np.int64)

    @contextmanager
    def _request(self, rows: int) -> Iterator[ov.InferRequest]:
        """Give an idle request for a number of patches, or a new one."""
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
        """From patches (N, columns) to candidates (N, count): the best vector of each part, and the best ones of those."""
        patches = ops.parameter([rows, self._columns], np.float32)
        factors = self._factors()
        values, indices = [], []
        for part, factor in enumerate(factors):
            nearness = ops.matmul(patches, factor, transpose_a=False, transpose_b=True)
            best = ops.topk(nearness, np.int64(1), 1, "max", "none", "i32")
            values.append(best.output(0))
            indices.append(ops.add(best.output(1), np.int32(part * len(factor))).output(0))
        count = np.int64(min(self.count, len(factors)))
        order = ops.topk(ops.concat(values, 1), count, 1, "max", "value", "i32")
        found = ops.gather_elements(ops.concat(indices, 1), order.output(1), 1)
        return ov.Model([found], [patches], "candidates")

    def _factors(self) -> NDArray[np.float32]:
        """Factors of the product, for each part of the bank (parts, rows, columns): vectors and terms of their squares.

        A vector is the nearer, the larger -|x - y|^2 / 2 = x @ y - |x|^2 / 2 - |y|^2 / 2 is. Both squares are split into
        bfloat16 numbers that lose nothing, and become further columns of the product.
        """
        size, dimension = self._vectors.shape
        rows = _next_multiple(-(-size // CANDIDATES_LIMIT), _ROWS_MULTIPLE)
        parts = -(-size // rows)
        factors = np.zeros((parts * rows, self._columns), np.float32)
        centered = factors[:size, :dimension]
        np.subtract(self._vectors, self._mean, out=centered)
        factors[:, dimension : dimension + _TERMS] = 1
        factors[:size, dimension + _TERMS : dimension + 2 * _TERMS] = _bfloat16_terms(_minus_half_squares(centered))
        factors[size:, dimension + _TERMS] = -1e38  # the rows that fill up the last part are far from every patch
        return factors.reshape(parts, rows, -1)


def _next_multiple(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


def _minus_half_squares(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """-|x|^2 / 2 of each vector x (N, D)."""
    return np.einsum("nd,nd->n", vectors, vectors) * np.float32(-0.5)


def _bfloat16_terms(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Three numbers (N, 3) that bfloat16 holds exactly, and that add up to each value (N,)."""
    terms = []
    for _ in range(_TERMS):
        terms.append((values.view(np.uint32) & 0xFFFF0000).view(np.float32))
        values = values - terms[-1]
    return np.stack(terms, 1)
