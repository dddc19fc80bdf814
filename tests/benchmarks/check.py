"""Which share of defective images among normal ones does `patchcore check` rank first? EfficientNet-Lite0, 256 x 256.

    python tests/benchmarks/check.py                      # ELPV's monocrystalline cells
    python tests/benchmarks/check.py --data MTD_FOLDER    # a folder with train/good and test/DEFECT

Normal images of train/good, and one defective image for each 19 of them, drawn by each seed. The rule was chosen on seed 0.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from common import heading
from rich.progress import track

from patchcore_plugin.cleaning import DEFAULT_ARGUMENTS
from patchcore_plugin.cleaning.evidence import SUSPICIOUS_SCORE, find_evidence
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import find_images
from patchcore_plugin.model.embedder import Embedder

NORMAL_PER_DEFECTIVE = 19
SHARES = 0.05, 0.06, 0.1


def embed(paths: list[Path]) -> torch.Tensor:
    """Embeddings (N, h, w, D) of images, float16."""
    stream = Embedder(DEFAULT_ARGUMENTS, len(paths)).stream(paths)
    return torch.stack([embedding.half() for embedding in track(stream, "Embed", len(paths))])


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--normal", type=int, multiple=True, help="Normal images; may be repeated.  [default: all]")
@click.option("--seeds", default=4, show_default=True)
def main(data: Path | None, normal: tuple[int, ...], seeds: int) -> None:
    """Print the share of defective images among the first of the ranking."""
    click.echo(heading())
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder)
            lay_out(data)
        good = embed(find_images(data / "train" / "good"))
        bad = embed([path for path in find_images(data / "test") if path.relative_to(data / "test").parts[0] != "good"])
    click.echo(
        "images + defective | seed | of these among the first 5 % | 6 % | 10 % | suspicious: defective | normal | seconds"
    )
    for count in normal or (len(good),):
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            drawn = good[np.sort(rng.permutation(len(good))[:count])]
            planted = bad[np.sort(rng.permutation(len(bad))[: round(len(drawn) / NORMAL_PER_DEFECTIVE)])]
            images = torch.cat([drawn, planted])
            defective = np.arange(len(images)) >= len(drawn)
            started = time.perf_counter()
            scores = find_evidence(lambda images=images: iter(images), len(images), seed).scores
            spent = time.perf_counter() - started
            order = np.argsort(-scores, kind="stable")
            found = [defective[order[: int(np.ceil(share * len(images)))]].sum() / defective.sum() for share in SHARES]
            flagged = scores > SUSPICIOUS_SCORE
            cells = [*found, flagged[defective].mean(), flagged[~defective].mean()]
            shown = " | ".join(f"{cell:.1%}" for cell in cells)
            click.echo(f"{len(drawn)} + {len(planted)} | {seed} | {shown} | {spent:.0f}")


if __name__ == "__main__":
    main()
