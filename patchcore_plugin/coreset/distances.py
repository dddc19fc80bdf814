"""Exact distances to the nearest centre, kept up to date by low-precision products: the arithmetic of the coreset.

An update is one matrix product in low precision (bfloat16 where the processor multiplies it faster) which, together with
a bound on its error, rules out the (row, centre) pairs that cannot matter; float64 differences decide the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Protocol

import torch

_BLOCK = 2048  # rows: a processor keeps their working set in its cache
_PIECE = 2**18  # values of a temporary: larger ones are new memory every time, whose first touch costs more than the work
_ACCELERATOR = {"block": 2**16, "piece": 2**24}  # the same for a device whose every call has to be large
_SEGMENT = 64  # columns of a product whose minimum is looked at first
_PAD = 256  # products have a multiple of this many columns: few shapes, for which kernels are compiled once
_LEAF = 512  # rows among which picks are made one by one
_LEAF_STEPS = 32  # picks between two looks at their values: a look makes an accelerator wait


def piece(points: torch.Tensor) -> int:
    """Rows of ``points`` (N, D) to take at a time, where each makes temporaries."""
    return max(1, (_PIECE if points.device.type == "cpu" else _ACCELERATOR["piece"]) // points.shape[1])


class Lens:
    """How rows enter a low-precision product: centred, scaled by a power of two, rounded, with the error that this makes.

    Centring and scaling change no comparison of distances; they keep rounding small and squares in range.

    Args:
        mean: Centre of the rows (D,), float32.
        scale: Power of two that brings the largest centred row near length 1.
        dtype: float32 or bfloat16.
    """

    def __init__(self, mean: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
        self.shift = -mean * scale
        self.scale = scale
        self.dtype = dtype
        self.bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
        self.tail = 3 if dtype == torch.bfloat16 else 1  # numbers that together hold a float32
        # Error of a product's sums: relative (with room for processors that round twice), and absolute, as numbers below
        # the range of float32 are flushed to zero.
        self.sums = (len(mean) + 16) * 2.0**-22
        self.tiny = len(mean) * 2.0**-120
        self.result = torch.finfo(dtype).eps * 0.53  # rounding of a product's result

    def full(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows (M, D), centred and scaled, float32."""
        if rows.dtype == torch.float64:  # rounded after the subtraction, so that the error stays relative to the result
            return torch.add(self.shift.double(), rows, alpha=self.scale).float()
        return torch.add(self.shift, rows.float(), alpha=self.scale, out=out)

    def describe(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rounded rows (M, D), their squared lengths (M,), and how far rounding moved each at most (M,)."""
        full = self.full(rows)
        rounded = full.to(self.dtype)
        back = rounded.float()
        squares = back.square().sum(1)
        lost = math.sqrt(len(self.shift)) * 2.0**-62  # what squares that underflow may hide
        return rounded, squares, (full - back).square_().sum(1).sqrt_() + squares.sqrt() * 2.0**-22 + lost

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """float32 values (M,) as a sum of :attr:`tail` numbers of the low precision (M, tail)."""
        parts = []
        for _ in range(self.tail):
            parts.append(values.to(self.dtype))
            values = values - parts[-1].float()
        return torch.stack(parts, 1)

    def round_up(self, values: torch.Tensor) -> torch.Tensor:
        """Bits of the smallest low-precision numbers that are not below non-negative float32 ``values``.

        Bits of non-negative numbers compare as whole numbers do, and those of negative ones lie below; comparing whole
        numbers is several times faster than comparing bfloat16.
        """
        bits = values.to(self.dtype).view(self.bits)
        return bits + (bits.view(self.dtype).float() < values)


class Centres:
    """New centres (B, D) as factors of a product with rows.

    Attributes:
        factor: ``row @ factor[i]`` is the squared distance of a row ``[row, |row|^2, 1]`` to centre ``i``; more columns
            than centres, the last repeated.
        exact: The centres, float64.
        error: How far rounding moved any of them at most.
        length: Of the longest.
    """

    def __init__(self, vectors: torch.Tensor, lens: Lens) -> None:
        rounded, squares, errors = lens.describe(vectors)
        ones = torch.ones((len(vectors), lens.tail), dtype=lens.dtype, device=vectors.device)
        self.factor = padded(torch.cat([rounded * -2, ones, lens.split(squares)], 1))
        self.exact = vectors.double()
        self.error, self.length = float(errors.max()), math.sqrt(float(squares.max()))

    def __len__(self) -> int:
        return len(self.exact)


class Reach(Protocol):
    """Which centres to hold against which rows."""

    order: torch.Tensor

    def within(self, block: int, centres: Centres) -> torch.Tensor:
        """Numbers of the centres that can matter to the rows of one block, in :attr:`order`."""


class Rows:
    """Rows (N, D) with their exact squared distances to the nearest centre.

    Args:
        points: The rows, of any floating type.
        lens: How they enter products.
        nearest: Squared distances so far (N,), float64. ``None`` for no centre yet.
        clusters: Also keep the number of each row's nearest centre, in ``owner``.
    """

    def __init__(
        self, points: torch.Tensor, lens: Lens, nearest: torch.Tensor | None = None, *, clusters: bool = False
    ) -> None:
        self.points = points
        self.lens = lens
        device = points.device
        block = _BLOCK if device.type == "cpu" else min(_ACCELERATOR["block"], piece(points))
        self.block = -(-min(block, max(len(points), 1)) // _SEGMENT) * _SEGMENT
        if nearest is None:
            nearest = torch.full((len(points),), math.inf, dtype=torch.float64, device=device)
        self.nearest = nearest
        self.owner = torch.zeros(len(points), dtype=torch.int32, device=device) if clusters else None
        self._squares = torch.empty((len(points), lens.tail), dtype=lens.dtype, device=device)
        self._errors = torch.empty(len(points), device=device)
        for start in range(0, len(points), piece(points)):
            part = slice(start, start + piece(points))
            _, squares, self._errors[part] = lens.describe(points[part])
            self._squares[part] = lens.split(squares)

    def distances(self, numbers: torch.Tensor) -> torch.Tensor:
        """Upper bounds (M,) of the distances of some rows, scaled as the lens scales rows, float32."""
        return self._scaled(self.nearest.index_select(0, numbers))

    def _scaled(self, nearest: torch.Tensor) -> torch.Tensor:
        return (nearest.sqrt() * (self.lens.scale * (1 + 2.0**-22))).float()

    def update(self, vectors: torch.Tensor, first: int = 0, reach: Reach | None = None) -> None:
        """Lower the distances by new centres.

        Args:
            vectors: The new centres (B, D), of the rows' type.
            first: Number of the first of them.
            reach: Which of them to hold against which rows; ``None`` for all against all.
        """
        lens, width = self.lens, self.points.shape[1]
        centres = Centres(vectors, lens)
        left = torch.ones((self.block, centres.factor.shape[1]), dtype=lens.dtype, device=vectors.device)
        scaled = torch.empty((self.block, width), device=vectors.device)
        gathered = torch.empty((self.block if reach else 0, width), dtype=self.points.dtype, device=vectors.device)
        buffer = torch.empty(self.block * len(centres.factor), dtype=lens.dtype, device=vectors.device)
        for start in range(0, len(self.points), self.block):
            stop = min(start + self.block, len(self.points))
            if reach is None:
                numbers, factor, index = None, centres.factor, torch.arange(start, stop, device=vectors.device)
                rows = self.points[start:stop]
            else:
                numbers = reach.within(start // self.block, centres)
                if not len(numbers):
                    continue
                factor, index = centres.factor.index_select(0, padded(numbers)), reach.order[start:stop]
                rows = torch.index_select(self.points, 0, index, out=gathered[: stop - start])
            squares = self._squares.index_select(0, index)
            left[: len(rows), :width] = lens.full(rows, out=scaled[: len(rows)])
            left[: len(rows), width : width + lens.tail] = squares
            # whole blocks, whatever their last rows hold: one shape fewer
            product = torch.mm(left, factor.T, out=buffer[: self.block * len(factor)].view(self.block, -1))[: len(rows)]
            sums = (squares[:, 0].float().sqrt() * 1.01 + centres.length).square_() * lens.sums + lens.tiny
            slack = self._errors.index_select(0, index) + centres.error
            row, column = self._near(product, self.nearest.index_select(0, index), slack, sums)
            real = column < (len(centres) if numbers is None else len(numbers))
            row, column = row[real], column[real]
            if numbers is not None:
                column = numbers.index_select(0, column)
            self._recheck(rows, row, index, centres.exact, column, first)

    def _near(
        self, product: torch.Tensor, nearest: torch.Tensor, slack: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of row and column that may bring the row a smaller distance, and the smallest of all.

        Args:
            product: Squared distances (M, B), with all errors of low precision.
            nearest: Exact squared distances so far (M,).
            slack: How far rounding moved row and centre together at most (M,).
            sums: Error of the product's sums (M,).
        """
        lens = self.lens
        keys = product.view(lens.bits).view(len(product), -1, _SEGMENT)
        lowest_keys = keys.amin(2)
        lowest = lowest_keys.amin(1).view(lens.dtype).float().clamp_(min=0)
        limit = ((self._scaled(nearest) + slack).square_() + sums) * (1 + lens.result)
        near = (lowest <= limit).nonzero().squeeze(1)
        sums, slack, lowest = sums.index_select(0, near), slack.index_select(0, near), lowest.index_select(0, near)
        best = (lowest * (1 + 2 * lens.result) + sums).sqrt_() + 2 * slack
        limit = torch.minimum(limit.index_select(0, near), (best.square_() + sums) * (1 + lens.result))
        limit = lens.round_up(limit)[:, None]
        # first the segments of columns that hold such a pair, then the pairs
        which, segment = (lowest_keys.index_select(0, near) <= limit).nonzero().unbind(1)
        row = near.index_select(0, which)
        columns = keys.view(-1, _SEGMENT).index_select(0, row * keys.shape[1] + segment)
        pair, column = (columns <= limit.index_select(0, which)).nonzero().unbind(1)
        return row.index_select(0, pair), column + segment.index_select(0, pair) * _SEGMENT

    def _recheck(
        self,
        rows: torch.Tensor,
        row: torch.Tensor,
        index: torch.Tensor,
        exact: torch.Tensor,
        column: torch.Tensor,
        first: int,
    ) -> None:
        """Lower distances by pairs of ``rows[row]``, which are the rows at ``index[row]``, and ``exact[column]``."""
        for r, c in zip(row.split(piece(rows)), column.split(piece(rows)), strict=True):
            distance = exact.index_select(0, c).sub_(rows.index_select(0, r)).square_().sum(1)
            place = index.index_select(0, r)
            self.nearest.scatter_reduce_(0, place, distance, "amin")
            if self.owner is not None:
                nearer = distance == self.nearest.index_select(0, place)
                self.owner[place[nearer]] = (c[nearer] + first).int()

    def farthest(self, limit: int, floor: float) -> torch.Tensor:
        """Pick up to ``limit`` rows farthest first, as long as their squared distance is above ``floor``.

        Distances are brought up to date only as far as picking needs it.

        Returns:
            Positions (K,), int64.
        """
        leaf = min(_LEAF, max(64, 2**17 // self.points.shape[1]))
        if len(self.points) <= leaf:
            return self._farthest_of_few(limit, floor)
        picks = torch.empty(0, dtype=torch.int64, device=self.points.device)
        while True:
            rows, outside = candidates(self.nearest, leaf)
            values = self.nearest.index_select(0, rows)
            best = float(values.max())
            if best <= floor:
                return picks
            few = Rows(self.points.index_select(0, rows), self.lens, values)
            batch = few.farthest(limit - len(picks), max(outside, floor)) if best > outside else rows[:0]
            if not len(batch):
                batch = values.argmax().view(1)
            batch = rows.index_select(0, batch)
            picks = torch.cat([picks, batch])
            if len(picks) >= limit:
                return picks
            self.update(self.points.index_select(0, batch))

    def _farthest_of_few(self, limit: int, floor: float) -> torch.Tensor:
        points, nearest = self.points.double(), self.nearest.clone()
        picks: list[int] = []
        while len(picks) < limit:
            best, values = [], []
            for _ in range(min(_LEAF_STEPS, limit - len(picks))):
                best.append(nearest.argmax().view(1))
                values.append(nearest.index_select(0, best[-1]))
                torch.minimum(nearest, (points - points.index_select(0, best[-1])).square_().sum(1), out=nearest)
            good = sum(value > floor for value in torch.cat(values).tolist())  # values never rise
            picks += torch.cat(best).tolist()[:good]
            if good < len(best):
                break
        return torch.tensor(picks, dtype=torch.int64, device=points.device)


def candidates(nearest: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """The ``count`` farthest rows in order of their position, and the largest squared distance outside them.

    The first of all farthest rows is among them, also where many are equally far. -1 stands for nothing outside.
    """
    values, rows = torch.topk(nearest, min(count + 1, len(nearest)))
    outside = float(values[count]) if len(values) > count else -1.0
    rows = rows[:count]
    first = nearest.argmax().view(1)
    if not bool((rows == first).any()):
        rows[-1:] = first
    return rows.sort().values, outside


def padded(values: torch.Tensor) -> torch.Tensor:
    """``values`` with the last repeated up to one of few lengths."""
    missing = -len(values) % (_PAD if len(values) > _PAD else _SEGMENT)
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])


@lru_cache
def product_type(device: torch.device, columns: int, threads: int) -> torch.dtype:
    """The type of products that is faster here: bfloat16 or float32."""
    del threads  # part of the cache's key
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((2048, columns), generator=generator)
    times = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = rows.to(dtype), rows[:512].to(dtype).T.contiguous().T
        product = left @ right.T
        runs = []
        for _ in range(3):
            started = time.perf_counter()
            torch.mm(left, right.T, out=product)
            runs.append(time.perf_counter() - started)
        times[dtype] = min(runs)
        # Products must be summed in float32, as the error bound assumes; not every library does so everywhere.
        truth = left[:128].double() @ right.double().T
        error = (product[:128].double() - truth).abs()
        if bool((error > truth.abs() * torch.finfo(dtype).eps * 0.53 + columns * 2.0**-18).any()):
            del times[dtype]
    return min(times, key=times.get, default=torch.float32)


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Keep float32 products float32: the filter's error bound does not hold for the bf16 or TF32 a user may allow."""
    if hasattr(torch.backends.mkldnn, "matmul"):  # torch 2.9 and later
        settings = [(torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.mkldnn.matmul, "fp32_precision")]
        before = [getattr(*setting) for setting in settings]
        for setting in settings:
            setattr(*setting, "ieee")
        restore = [partial(setattr, *setting, value) for setting, value in zip(settings, before, strict=True)]
    else:
        restore = [partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())]
        torch.set_float32_matmul_precision("highest")
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    restore.append(partial(setattr, torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", reduced))
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for action in restore:
            action()
