"""Growth of the sampler's time with the rows and with the centers, on real embeddings of solar cells.

    python tests/benchmarks/coreset_growth.py --plot growth.png

Prints the times, and draws them on logarithmic axes.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch
from common import elpv_embeddings, heading
from matplotlib.figure import Figure

from patchcore_plugin.coreset import GreedyCoreset


def seconds(points: torch.Tensor, centers: int) -> float:
    started = time.perf_counter()
    GreedyCoreset(size=centers).fit(points)
    return time.perf_counter() - started


def show(title: str, sizes: list[int], times: list[float]) -> float:
    """Print a table and return the exponent of growth between the last two."""
    click.echo(f"\n{title}")
    for size, spent in zip(sizes, times, strict=True):
        click.echo(f"{size:>12,}  {spent:7.1f} s  {'#' * round(60 * spent / max(times))}")
    exponent = np.log(times[-1] / times[-2]) / np.log(sizes[-1] / sizes[-2])
    click.echo(f"{'':>12}  grows with the power {exponent:.2f} at the end")
    return float(exponent)


@click.command()
@click.option("--images", default=1000, show_default=True, help="Solar cells to embed, 1,024 patches each.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), default="growth.png", show_default=True)
def main(images: int, plot: Path) -> None:
    """Print and plot the time against the number of rows and of centers."""
    points = elpv_embeddings(images)
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]  # the first rows are a sample
    click.echo(heading())
    rows = [len(points) // part for part in (8, 4, 2, 1)]
    panels = {
        "rows, 10,000 centers": (rows, [seconds(points[:n], 10_000) for n in rows]),
        "rows, 10 % of them as centers": (rows, [seconds(points[:n], n // 10) for n in rows]),
    }
    half = points[: len(points) // 2]
    centers = [len(half) // part for part in (160, 40, 10, 5)]
    panels[f"centers, {len(half):,} rows"] = (centers, [seconds(half, k) for k in centers])
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (title, (sizes, times)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        exponent = show(title, sizes, times)
        axes.loglog(sizes, times, "o-", base=10)
        axes.set(title=f"power {exponent:.2f} at the end", xlabel=title, ylabel="seconds")
        axes.set_xticks([], minor=True)
        axes.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
        axes.set_yticks([], minor=True)
        axes.set_yticks(times, labels=[f"{spent:.1f}" for spent in times])
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(plot, dpi=120)
    click.echo(f"\nPlot: {plot}")


if __name__ == "__main__":
    main()
