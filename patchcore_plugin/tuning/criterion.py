"""The criterion: AUROC of defective against held-out normal images, its standard error, and the choice by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class FoldScores:
    """Image scores of one setting, each from a bank that has not learned the image.

    Attributes:
        normal: Score of each normal image (N,), by the bank of the other folds' images.
        fold: Fold of each normal image (N,), int.
        defective: Score of each defective image by the bank of each fold (D, F). NaN where a bank does not count: for a
            synthetic defect, all but that of its normal image's fold.
    """

    normal: NDArray[np.float64]
    fold: NDArray[np.int64]
    defective: NDArray[np.float64]

    def wins(self) -> NDArray[np.float64]:
        """Whether a defective image's score is above a normal image's (D, N), both by one bank.

        Returns:
            1 above, 0 below, 0.5 for equal scores; NaN for pairs that no bank compares.
        """
        defective = self.defective[:, self.fold]
        wins = (defective > self.normal) + 0.5 * (defective == self.normal)
        return np.where(np.isnan(defective), np.nan, wins)


class Estimate(NamedTuple):
    """An AUROC, or a difference of two, with its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """One setting against the config's own.

    Attributes:
        auroc: Its AUROC.
        difference: Its AUROC less that of the config's setting, on the same images.
    """

    auroc: Estimate
    difference: Estimate


def estimate(wins: NDArray[np.float64]) -> Estimate:
    """Mean of wins (D, N), or of differences of wins, and its standard error by the rows and columns (DeLong et al. 1988).

    The mean of a row, the share of normal images below a defective one, varies with the defective images drawn, and that of
    a column with the normal images.
    """
    rows, columns = np.nanmean(wins, axis=1), np.nanmean(wins, axis=0)
    return Estimate(float(rows.mean()), float(np.sqrt(rows.var(ddof=1) / len(rows) + columns.var(ddof=1) / len(columns))))


def compare(scores: Sequence[FoldScores]) -> list[Comparison]:
    """Compare settings with the first of them, pair by pair of images."""
    wins = [score.wins() for score in scores]
    return [Comparison(estimate(own), estimate(own - wins[0])) for own in wins]


def choose(comparisons: Sequence[Comparison], margin: float) -> int:
    """Number of the best setting; the first, unless another is better by a margin.

    Args:
        comparisons: What :func:`compare` returns.
        margin: Standard errors of its difference by which another setting must be better.
    """
    better = [
        number
        for number, (gain, error) in enumerate(comparison.difference for comparison in comparisons)
        if number and gain > margin * error
    ]
    return max(better, key=lambda number: comparisons[number].difference.value, default=0)
