"""Search time of the memory bank against its size, next to that of a flat index.

    python tests/benchmarks/bank.py                 # real embeddings of solar cells, 10,000 to 1,000,000 x 152
    python tests/benchmarks/bank.py --data coreset  # the first 10,000 to 250,000 picks of all of them
    python tests/benchmarks/bank.py --data wide     # as many values as wide_resnet50_2 has, 16,000 and 160,000 x 1,536
    python tests/benchmarks/bank.py --data wide --index hnsw --index reduced  # two kinds of index, one beside the other

Wide embeddings are real too: those of the stages 1, 2, 4 and 6 of EfficientNet-Lite0, 1 and 2 side by side (496 + 496 + 544
values), averaged over 2 x 2 patches to 28 x 28 an image.

Queries are all patches of one image, none of which is in the bank. Times are medians over images, one at a time.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import get_args

import click
import elpv_dataset
import numpy as np
import openvino as ov
import torch
from anomalib.data.utils import read_image
from common import elpv_embeddings, heading
from rich.console import Console
from rich.progress import track
from rich.table import Table

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.bundle import IndexKind
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.cpu import compile_options, cores
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.memory_bank.choice import choose
from patchcore_plugin.model.conversion import convert
from patchcore_plugin.scoring import ScoreRule

IMAGES = 12
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
STAGES = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]


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
    """Bank vectors of 1,536 values in random order, and embeddings of images that none of them comes from."""
    paths = sorted(Path(elpv_dataset.__file__).parent.rglob("*.png"))
    random.Random(0).shuffle(paths)
    paths = paths[: IMAGES + -(-largest // 500)]  # of each image's 784 patches, 500 at random
    models = [
        FaissPatchcore(backbone=f"efficientnet_lite{number}", layers=STAGES, normalization="imagenet", image_size=[224, 224])
        for number in range(3)
    ]
    transform, images, vectors = models[0].pre_processor.transform, [], []
    generator = torch.Generator().manual_seed(0)
    for number, path in enumerate(track(paths, description="Embed")):
        image = transform(read_image(path, as_tensor=True)[None])
        parts = [model.model.embed(image).permute(0, 3, 1, 2) for model in models]
        embedding = torch.nn.functional.avg_pool2d(torch.cat(parts, 1), 2).permute(0, 2, 3, 1)
        if number < IMAGES:
            images.append(embedding)
        else:
            vectors.append(embedding.reshape(784, -1)[torch.randperm(784, generator=generator)[:500]])
    points = torch.cat(vectors)
    return points[torch.randperm(len(points), generator=generator)], torch.cat(images)


def network_milliseconds() -> float:
    """Time of wide_resnet50_2's network for an image of 784 patches, with all threads; its weights are random."""
    model = FaissPatchcore(pre_trained=False).model.eval()
    network = convert(model, 224, 224)
    network.reshape([1, 3, 224, 224])
    compiled = ov.Core().compile_model(network, "CPU", {**compile_options("latency", cores()), **F32})
    image = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    return 1000 * float(np.median([timed(lambda: compiled([image])) for _ in range(33)][3:]))


DATA = {
    "elpv": (real, (10_000, 42_086, 200_000, 1_000_000)),
    "coreset": (coreset, (10_000, 42_086, 100_000, 250_000)),
    "wide": (wide, (16_000, 160_000)),
}


@click.command()
@click.option("--data", type=click.Choice(list(DATA)), default="elpv", show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, help="Number of bank vectors; may be repeated.")
@click.option("--index", "kinds", type=click.Choice(get_args(IndexKind)), multiple=True, help="Only this; may be repeated.")
@click.option("--storage", type=click.Choice(["float32", "float16", "int8"]), default="float32", show_default=True)
def main(data: str, sizes: tuple[int, ...], kinds: tuple[str, ...], storage: str) -> None:
    """Print the search time and recall of the index that the measured choice takes, and the time of a flat index."""
    embeddings, usual = DATA[data]
    sizes = sizes or usual
    points, images = embeddings(max(sizes))
    click.echo(heading("faiss-cpu", columns=points.shape[1]))
    table = Table(
        "vectors", "index", "build s", "file MiB", "load s", "ms an image", "recall@1", "score error", "flat ms", "ratio"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.faiss"
        for size in sizes:
            vectors = points[:size].numpy()
            flat = choose(vectors, images.numpy(), ScoreRule(), "flat", storage, threads=cores())[1][0].milliseconds
            for kind in kinds or (None,):
                bank, trials = choose(vectors, images.numpy(), ScoreRule(), kind, storage, threads=cores())
                taken = next(trial for trial in trials if (trial.index, trial.width) == (bank.index, bank.width))
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
    if data == "wide":
        click.echo(f"wide_resnet50_2's network takes {network_milliseconds():.1f} ms.")


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
