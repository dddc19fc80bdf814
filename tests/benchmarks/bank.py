"""Search time of the memory bank against its size, next to that of a flat index.

    python tests/benchmarks/bank.py                 # real embeddings of solar cells, 10,000 to 1,000,000 x 152
    python tests/benchmarks/bank.py --data coreset  # the first 10,000 to 250,000 picks of all of them
    python tests/benchmarks/bank.py --data wide     # random clusters of wide_resnet50_2's shape, 16,000 and 160,000 x 1,536

Queries are all patches of one image, none of which is in the bank. Times are medians over images, one at a time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from common import clustered, elpv_embeddings, heading
from rich.console import Console
from rich.table import Table

from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.cpu import cores
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank.choice import choose
from patchcore_plugin.scoring import ScoreRule

IMAGES = 12


def timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def real(largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bank vectors in random order, and patch embeddings (B, h, w, D) of images that none of them comes from."""
    points = elpv_embeddings(-(-largest // 1024) + IMAGES)
    images, points = points[: IMAGES * 1024].reshape(IMAGES, 32, 32, -1), points[IMAGES * 1024 :]
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))], images


def coreset(largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bank vectors in the order in which the sampler picks them, so that the first ones are a coreset at every size."""
    points, images = real((2624 - IMAGES) * 1024)
    return points[GreedyCoreset(ratio=largest / len(points)).fit(points)], images


def wide(largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of random clusters, 784 of them for each image."""
    points = clustered(largest + IMAGES * 784, 1536)
    return points[IMAGES * 784 :], points[: IMAGES * 784].reshape(IMAGES, 28, 28, -1)


DATA = {
    "elpv": (real, (10_000, 42_086, 200_000, 1_000_000)),
    "coreset": (coreset, (10_000, 42_086, 100_000, 250_000)),
    "wide": (wide, (16_000, 160_000)),
}


@click.command()
@click.option("--data", type=click.Choice(list(DATA)), default="elpv", show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, help="Number of bank vectors; may be repeated.")
@click.option("--storage", type=click.Choice(["float32", "float16", "int8"]), default="float32", show_default=True)
def main(data: str, sizes: tuple[int, ...], storage: str) -> None:
    """Print the search time and recall of the index that the measured choice takes, and the time of a flat index."""
    embeddings, usual = DATA[data]
    sizes = sizes or usual
    points, images = embeddings(max(sizes))
    click.echo(heading("faiss-cpu", columns=points.shape[1]))
    table = Table(
        "vectors", "index", "build s", "file MiB", "load s", "ms an image", "recall@1", "error at 99.9 %", "flat ms", "ratio"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.faiss"
        for size in sizes:
            vectors = points[:size].numpy()
            bank, trials = choose(vectors, images.numpy(), ScoreRule(), storage=storage, threads=cores())
            taken = next(trial for trial in trials if (trial.index, trial.width) == (bank.index, bank.width))
            flat = trials[0].milliseconds
            build = timed(lambda bank=bank, vectors=vectors: MemoryBank(vectors, bank.index, storage, num_neighbors=9))
            click.echo(
                f"{size:,}: " + ", ".join(f"{t.index} {t.width}: {t.milliseconds:.1f} ms {t.recall:.4f}" for t in trials)
            )
            bank.save(path)
            load = timed(lambda: MemoryBank.load(path))
            table.add_row(
                f"{size:,}", f"{bank.index} {bank.width or ''}", f"{build:.1f}", f"{path.stat().st_size / 2**20:.0f}",
                f"{load:.2f}", f"{taken.milliseconds:.1f}", f"{taken.recall:.4f}", f"{taken.error:.0e}", f"{flat:.0f}",
                f"{flat / taken.milliseconds:.1f}",
            )  # fmt: skip
            del bank
    Console(width=125).print(table)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
