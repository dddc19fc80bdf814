"""The sampler in two processes over gloo, with unequal parts of ELPV's training embeddings, against one process.

    python tests/benchmarks/coreset_processes.py

The two processes share the cores; the single process uses all of them.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from common import elpv_embeddings, heading

from patchcore_plugin.coreset import GreedyCoreset


def work(rank: int, folder: str, cuts: list[int], ratio: float) -> None:
    torch.set_num_threads(max(1, os.cpu_count() // (len(cuts) - 1)))
    rows = torch.from_numpy(np.load(f"{folder}/points.npy", mmap_mode="r")[cuts[rank] : cuts[rank + 1]].copy())
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{len(cuts)}", rank=rank, world_size=len(cuts) - 1)
    sampler = GreedyCoreset(ratio=ratio, progress=False)
    dist.barrier()
    started = time.perf_counter()
    picks = sampler.fit(rows, dist.group.WORLD)
    spent = time.perf_counter() - started
    torch.save((picks, spent, sampler.radius_), f"{folder}/{len(cuts) - 1}-{rank}.pt")
    dist.destroy_process_group()


@click.command()
@click.option("--ratio", default=0.1, show_default=True)
@click.option("--share", default=0.4, show_default=True, help="Share of the rows in the first process.")
def main(ratio: float, share: float) -> None:
    """Print the times of one process and of two, and whether both pick the same rows."""
    points = elpv_embeddings()
    click.echo(heading())
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/points.npy", points.numpy())
        found = {}
        for cuts in ([0, len(points)], [0, int(len(points) * share), len(points)]):
            world = len(cuts) - 1
            multiprocessing.spawn(work, args=(folder, cuts, ratio), nprocs=world)
            found[world] = [torch.load(Path(folder, f"{world}-{rank}.pt")) for rank in range(world)]
    (picks, alone, radius), *_ = found[1]
    same = all(torch.equal(picks, other) for other, _, _ in found[2])
    together = max(spent for _, spent, _ in found[2])
    rows = [int(len(points) * share), len(points) - int(len(points) * share)]
    click.echo(f"{len(points):,} x {points.shape[1]}, {len(picks):,} centers, covering radius {radius:.4g}")
    click.echo(f"one process {alone:.1f} s; two processes with {rows[0]:,} and {rows[1]:,} rows {together:.1f} s")
    click.echo(f"same picks in both processes as in one: {same}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
