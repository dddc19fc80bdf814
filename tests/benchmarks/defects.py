"""What known defects are worth: image AUROC after 20 defective images were taught, on the others.

    python tests/benchmarks/defects.py                      # ELPV's monocrystalline cells
    python tests/benchmarks/defects.py --data MTD_FOLDER    # a folder with train/good, test/good and test/DEFECT

The bank is made of half of the normal images (a coreset of 1 %). Each draw teaches some defective images at random, as
`patchcore update --from` does: up to five patches of the worst region of each.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
from common import heading, nominal_halves
from rich.progress import track
from sklearn.metrics import roc_auc_score

from patchcore_plugin.memory_bank import Defects
from patchcore_plugin.operations.teaching import find_defect_patches


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--taught", default=20, show_default=True, help="Defective images that are taught.")
@click.option("--draws", default=10, show_default=True)
def main(data: Path | None, taught: int, draws: int) -> None:
    """Print the image AUROC without and with known defects."""
    click.echo(heading("openvino", "faiss-cpu"))
    with tempfile.TemporaryDirectory() as folder:
        runtime, normal, defective = nominal_halves(data, Path(folder))
        images = [*normal, *defective]
        outcomes = track(runtime.stream_outcomes(images), description="Embed", total=len(images))
        embeddings, plain = zip(*((outcome.embedding[None], outcome.prediction.score) for outcome in outcomes), strict=True)
        changes, higher = [], []
        for draw in track(range(draws), description="Teach"):
            chosen = np.random.default_rng(draw).choice(len(defective), taught, replace=False)
            vectors = find_defect_patches(runtime, [defective[number] for number in chosen])
            known = Defects(vectors, runtime.manifest.all_members, runtime.bank.threads)
            others = [*range(len(normal)), *(len(normal) + n for n in range(len(defective)) if n not in set(chosen))]
            after = [float(runtime.bank.score(embeddings[n], runtime.rule, known).image[0]) for n in others]
            before, labels = [plain[n] for n in others], [n >= len(normal) for n in others]
            changes.append(roc_auc_score(labels, after) - roc_auc_score(labels, before))
            higher.append(
                np.mean([new > old * 1.0001 for new, old, bad in zip(after, before, labels, strict=True) if not bad])
            )
    labels = [0] * len(normal) + [1] * len(defective)
    click.echo(
        f"{len(normal)} normal and {len(defective)} defective images, {taught} of them taught, {draws} draws. Image AUROC "
        f"without: {roc_auc_score(labels, plain):.4f}. Change on the others: mean {np.mean(changes):+.4f}, from "
        f"{min(changes):+.4f} to {max(changes):+.4f}. Normal images with a higher score: {np.mean(higher):.1%}."
    )


if __name__ == "__main__":
    main()
