"""Time of our coreset sampler against anomalib's, in one run.

    python tests/benchmarks/coreset.py                  # ELPV's training embeddings, 420,864 x 152, at 1 % and 10 %
    python tests/benchmarks/coreset.py --data wide      # random clusters of wide_resnet50_2's shape, 160,000 x 1,536, 10 %

The time of anomalib's ``KCenterGreedy`` is extrapolated from some of its steps, which all take the same time. Most of that
time goes into newly allocated memory, so another allocator (``LD_PRELOAD=libtcmalloc_minimal.so.4``) makes it faster. For
comparison, the script also times one matrix product of all rows with all centers, in blocks as large as the sampler's.
"""

from __future__ import annotations

import time

import click
import numpy as np
import torch
from anomalib.models.components import KCenterGreedy
from common import clustered, elpv_embeddings, heading

from patchcore_plugin.coreset import GreedyCoreset


class TimedPeer(KCenterGreedy):
    """anomalib's sampler, with the time of each pick."""

    def get_new_idx(self) -> torch.Tensor:
        pick = super().get_new_idx()
        self.picked_at.append(time.perf_counter())
        return pick


def peer_times(points: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of anomalib's sampler until the first pick, and for each further pick (median)."""
    peer = TimedPeer(embedding=points, sampling_ratio=1.0)
    peer.coreset_size = steps + 2
    peer.picked_at = []
    started = time.perf_counter()
    peer.select_coreset_idxs()
    first, *later = np.diff([started, *peer.picked_at])
    return first, float(np.median(later))


def product_time(points: torch.Tensor, centers: int, dtype: torch.dtype) -> float:
    """Seconds for one product of all rows and centers, extrapolated from some of its blocks."""
    rows, columns = points[:2048].to(dtype), points[2048:6144].to(dtype)
    out = torch.empty(2048, 4096, dtype=dtype)
    torch.mm(rows, columns.T, out=out)
    started = time.perf_counter()
    for _ in range(8):
        torch.mm(rows, columns.T, out=out)
    return (time.perf_counter() - started) / 8 * (len(points) / 2048) * (centers / 4096)


@click.command()
@click.option("--data", type=click.Choice(["elpv", "wide"]), default="elpv", show_default=True)
@click.option(
    "--ratio", "ratios", type=float, multiple=True, help="Share to pick; repeatable.  [default: 0.01 and 0.1; wide: 0.1]"
)
@click.option("--projection", type=float, help="Also pick by random projections, with this relative error at most.")
@click.option("--peer-steps", default=40, show_default=True, help="Steps of anomalib's sampler to time.")
def main(data: str, ratios: tuple[float, ...], projection: float | None, peer_steps: int) -> None:
    """Print the times of both samplers and their ratio."""
    points = elpv_embeddings() if data == "elpv" else clustered(160_000, 1536)
    click.echo(heading(columns=points.shape[1]))
    click.echo(f"embeddings {len(points):,} x {points.shape[1]:,}, float32")
    first, step = peer_times(points, peer_steps)
    click.echo(f"anomalib: {first:.2f} s for projection and start, then {step:.3f} s a step ({peer_steps} steps timed)")
    for ratio in ratios or ((0.01, 0.1) if data == "elpv" else (0.1,)):
        sampler = GreedyCoreset(ratio=ratio)
        started = time.perf_counter()
        picks = sampler.fit(points)
        ours = time.perf_counter() - started
        theirs = first + step * len(picks)
        click.echo(
            f"{ratio:.1%}: {len(picks):,} centers, ours {ours:.1f} s, anomalib {theirs:.0f} s (extrapolated): "
            f"{theirs / ours:.0f} times faster; covering radius {sampler.radius_:.4g}"
        )
        products = {dtype: product_time(points, len(picks), dtype) for dtype in (torch.float32, torch.bfloat16)}
        for dtype, spent in products.items():
            click.echo(f"      ours takes {ours / spent:.2f} times one {dtype} product of rows and centers ({spent:.1f} s)")
        if projection is not None:
            started = time.perf_counter()
            bank = points[GreedyCoreset(ratio=ratio, projection=projection).fit(points)]
            ours = time.perf_counter() - started
            reached = max(float(torch.cdist(part, bank).amin(1).max()) for part in points.split(4096))
            click.echo(
                f"      with projection {projection}: {ours:.1f} s, {theirs / ours:.0f} times faster; radius {reached:.4g}"
            )


if __name__ == "__main__":
    main()
