"""Is the promised false-alarm rate kept? Random splits of real normal images into calibration and test.

    python tests/benchmarks/false_alarms.py                      # ELPV's monocrystalline cells
    python tests/benchmarks/false_alarms.py --data MTD_FOLDER    # a folder with train/good, test/good and test/DEFECT

The bank is made of half of the normal images; the runtime scores the other half once. Each split takes half of the scores
for calibration. Among the others it counts images above the image threshold, and images with any pixel above the pixel
threshold. The 95 % interval is that of the mean over all splits. The last column is the range of single splits, from the
5th to the 95th percentile: the rate that one calibration may give.

A second table shows review bands: the shares of the normal images that are stopped and that are to review, and what becomes
of the defective ones.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from common import heading, nominal_halves
from rich.console import Console
from rich.progress import track
from rich.table import Table

from patchcore_plugin.bundle import Calibration
from patchcore_plugin.scoring.conformal import describe_promise, set_thresholds, threshold
from patchcore_plugin.scoring.thresholds import verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--splits", default=200, show_default=True)
def main(data: Path | None, splits: int) -> None:
    """Print the observed false-alarm rates next to the rates that were asked for."""
    click.echo(heading("openvino", "faiss-cpu"))
    with tempfile.TemporaryDirectory() as folder:
        runtime, normal, defective = nominal_halves(data, Path(folder))
        answers = track(runtime.stream(normal), description="Score", total=len(normal))
        scores, peaks = np.array([(answer.score, answer.anomaly_map.max()) for answer in answers]).T
        answers = track(runtime.stream(defective), description="Score", total=len(defective))
        defects = np.array([answer.score for answer in answers])
    count = len(scores) // 2
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(scores)) for _ in range(splits)]
    click.echo(f"{splits} splits of {len(scores)} normal images: {count} to calibrate, {len(scores) - count} to test")
    table = Table("asked for", "by theory", "level", "observed", "95 % interval", "single splits")
    for rate in (0.01, 0.05, 0.1):
        theory = math.floor((count + 1) * Fraction(str(rate))) / (count + 1)
        for level, values in (("image", scores), ("pixel", peaks)):
            alarms = np.array(
                [np.mean(values[order[count:]] > threshold(np.sort(values[order[:count]]), rate)) for order in orders]
            )
            margin = 1.96 * alarms.std(ddof=1) / math.sqrt(splits)
            low, high = np.quantile(alarms, [0.05, 0.95])
            table.add_row(
                f"{rate:.0%}", f"{theory:.2%}", level, f"{alarms.mean():.2%}",
                f"{alarms.mean() - margin:.2%} to {alarms.mean() + margin:.2%}", f"{low:.1%} to {high:.1%}",
            )  # fmt: skip
    Console(width=125).print(table)
    _print_bands(scores, defects, orders)


def _print_bands(scores: NDArray, defects: NDArray, orders: Sequence[NDArray]) -> None:
    """Print the share of each verdict, over all splits, among normal images and among defective ones."""
    count = len(scores) // 2
    table = Table(
        "stopped, reviewed", "by theory", "good stopped", "good to review", "defects stopped", "to review", "normal"
    )
    for rate, review_rate in ((0.01, 0.05), (0.01, 0.1), (0.05, 0.2)):
        shares = []
        for order in orders:
            values = np.sort(scores[order[:count]]).tolist()
            calibration = Calibration(
                false_positive_rate=rate, review_rate=review_rate, scores=values, peaks=values, means=values
            )
            scale, _ = set_thresholds(calibration)
            found = [Counter(verdict(score, scale) for score in part.tolist()) for part in (scores[order[count:]], defects)]
            shares.append([each[word] / each.total() for each in found for word in ("anomalous", "review", "normal")])
        mean, margin = np.mean(shares, axis=0), 1.96 * np.std(shares, axis=0, ddof=1) / math.sqrt(len(orders))
        good, seen, _, *defective = (f"{one:.2%} ± {other:.2%}" for one, other in zip(mean, margin, strict=True))
        table.add_row(f"{rate:.0%}, {review_rate:.0%}", describe_promise(calibration), good, seen, *defective)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
