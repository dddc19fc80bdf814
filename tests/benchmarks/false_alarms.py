"""Is the promised false-alarm rate kept? Random splits of real normal images into calibration and test.

    python tests/benchmarks/false_alarms.py                      # ELPV's monocrystalline cells
    python tests/benchmarks/false_alarms.py --data MTD_FOLDER    # a folder with train/good, test/good and test/DEFECT

The bank is made of half of the normal images; the runtime scores the other half once. Each split takes half of the scores
for calibration. Among the others it counts images above the image threshold, and images with any pixel above the pixel
threshold. The 95 % interval is that of the mean over all splits. The last column is the range of single splits, from the
5th to the 95th percentile: the rate that one calibration may give.
"""

from __future__ import annotations

import math
import tempfile
from fractions import Fraction
from pathlib import Path

import click
import numpy as np
from common import heading, nominal_halves
from rich.console import Console
from rich.progress import track
from rich.table import Table

from patchcore_plugin.scoring.conformal import threshold


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--splits", default=200, show_default=True)
def main(data: Path | None, splits: int) -> None:
    """Print the observed false-alarm rates next to the rates that were asked for."""
    click.echo(heading("openvino", "faiss-cpu"))
    with tempfile.TemporaryDirectory() as folder:
        runtime, normal, _ = nominal_halves(data, Path(folder))
        answers = track(runtime.stream(normal), description="Score", total=len(normal))
        scores, peaks = np.array([(answer.score, answer.anomaly_map.max()) for answer in answers]).T
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


if __name__ == "__main__":
    main()
