"""Rows and centers as factors of low-precision products, with bounds of the error that rounding makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from patchcore_plugin.coreset.products import RESULT_ERROR

if TYPE_CHECKING:
    from patchcore_plugin.coreset.tuning import Tuning


class RoundedRows(NamedTuple):
    """Rows as a low-precision product sees them.

    Attributes:
        values: The rows (M, D), centered, scaled and rounded.
        squares: Squared lengths of the rounded rows (M,), float32.
        errors: How far rounding moved each row, at most (M,), float32.
    """

    values: torch.Tensor
    squares: torch.Tensor
    errors: torch.Tensor


class Rounding:
    """How rows enter a low-precision product: centered, scaled by a power of two, and rounded.

    Centering and scaling change no comparison of distances. They keep rounding errors small and squares in range.

    Args:
        mean: Mean of the rows (D,), float32.
        scale: Power of two that brings the longest centered row near length 1.
        dtype: float32 or bfloat16.

    Attributes:
        int_dtype: Whole numbers with as many bits as ``dtype``.
        terms: How many numbers of ``dtype`` add up to a float32.
        sum_error: Error of the sums in a product, relative to their largest value. The bound leaves room for processors
            that round twice.
        absolute_error: Error of those sums that is not relative: numbers below float32's range become zero.
        result_error: Relative error of a product's result, which is rounded to ``dtype``.
    """

    def __init__(self, mean: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
        self.shift = -mean * scale
        self.scale = scale
        self.dtype = dtype
        self.int_dtype = torch.int16 if dtype == torch.bfloat16 else torch.int32
        self.terms = 3 if dtype == torch.bfloat16 else 1
        self.sum_error = (len(mean) + 16) * 2.0**-22
        self.absolute_error = len(mean) * 2.0**-120
        self.result_error = torch.finfo(dtype).eps * RESULT_ERROR

    def scaled(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows (M, D), centered and scaled, float32."""
        if rows.dtype == torch.float64:  # rounded after the subtraction, so that the error stays relative to the result
            return torch.add(self.shift.double(), rows, alpha=self.scale).float()
        return torch.add(self.shift, rows.float(), alpha=self.scale, out=out)

    def scaled_distances(self, squared: torch.Tensor) -> torch.Tensor:
        """Upper bounds, float32, of scaled distances, from squared distances (M,), float64, of the rows as they are."""
        return (squared.sqrt() * (self.scale * (1 + 2.0**-22))).float()

    def round(self, rows: torch.Tensor) -> RoundedRows:
        """Center, scale and round rows (M, D)."""
        scaled = self.scaled(rows)
        values = scaled.to(self.dtype)
        rounded = values.float()
        squares = rounded.square().sum(1)
        underflow = math.sqrt(len(self.shift)) * 2.0**-62  # what squares may hide that float32 takes for zero
        errors = (scaled - rounded).square_().sum(1).sqrt_() + squares.sqrt() * 2.0**-22 + underflow
        return RoundedRows(values, squares, errors)

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """float32 values (M,) as sums of :attr:`terms` numbers of the low precision (M, terms)."""
        parts = []
        for _ in range(self.terms):
            parts.append(values.to(self.dtype))
            values = values - parts[-1].float()
        return torch.stack(parts, 1)

    def round_up(self, values: torch.Tensor) -> torch.Tensor:
        """Bits of the smallest low-precision numbers that are not below non-negative float32 ``values``.

        Bits of non-negative numbers compare as whole numbers do, and bits of negative numbers lie below them. Whole numbers
        compare several times faster than bfloat16 does.
        """
        bits = values.to(self.dtype).view(self.int_dtype)
        return bits + (bits.view(self.dtype).float() < values)


class Centers:
    """New centers (B, D) as a factor of products with rows.

    Args:
        vectors: The centers, of the rows' type.
        rounding: How rows enter products.
        tuning: Sizes of the parts of the work.
        first: Number of the first center.

    Attributes:
        factor: The product of a row ``[row, |row|^2, 1]`` with ``factor[i]`` is its squared distance to center ``i``. There
            are more columns than centers: the last center is repeated.
        exact: The centers, float64.
        error: How far rounding moved any center, at most.
        length: Length of the longest center.
    """

    def __init__(self, vectors: torch.Tensor, rounding: Rounding, tuning: Tuning, first: int = 0) -> None:
        rounded = rounding.round(vectors)
        ones = torch.ones((len(vectors), rounding.terms), dtype=rounding.dtype, device=vectors.device)
        self.factor = padded(torch.cat([rounded.values * -2, ones, rounding.split(rounded.squares)], 1), tuning)
        self.exact = vectors.double()
        self.error, self.length = float(rounded.errors.max()), math.sqrt(float(rounded.squares.max()))
        self.first = first

    def __len__(self) -> int:
        return len(self.exact)


def padded(values: torch.Tensor, tuning: Tuning) -> torch.Tensor:
    """``values`` with the last one repeated, up to a length that products have."""
    missing = -len(values) % (tuning.padding_columns if len(values) > tuning.padding_columns else tuning.segment_columns)
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
