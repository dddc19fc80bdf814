"""What does `outlier_rejection` cost on clean training images, and gain on dirty ones? EfficientNet-Lite0, 256 x 256.

    python tests/benchmarks/outliers.py                      # ELPV's monocrystalline and polycrystalline cells
    python tests/benchmarks/outliers.py --data MTD_FOLDER    # a folder with train/good, test/good and test/DEFECT

Each seed draws ELPV's split, the first patch of the coreset, and the defective images that are taken out of the test set,
one for each 19 normal images to learn from. Clean training images are the normal ones, dirty ones these and the defective
ones. The test set is the same for both. Normalization is the backbone's; the search is exact.
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
from sklearn.metrics import roc_auc_score

from patchcore_plugin.cleaning import DEFAULT_ARGUMENTS
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.embedding_store import EmbeddingStore
from patchcore_plugin.coreset.outliers import find_outliers
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import find_images
from patchcore_plugin.memory_bank import MemoryBank
from patchcore_plugin.model.embedder import Embedder
from patchcore_plugin.scoring.scores import ScoreRule, image_score

NORMAL_PER_DEFECTIVE = 19
RULES = {"": ScoreRule(), " smoothed": ScoreRule(score_smoothing=1)}


def embed(folder: Path, kinds: list[str]) -> torch.Tensor:
    """Embeddings (N, h, w, D) of the images in some folders, float16."""
    paths = [path for kind in kinds for path in find_images(folder / kind)]
    stream = Embedder(DEFAULT_ARGUMENTS, len(paths)).stream(paths)
    return torch.stack([embedding.half() for embedding in track(stream, f"Embed {folder.name}", len(paths))])


def train(
    images: torch.Tensor, seed: int, ratio: float, budget: float | None, deviations: float
) -> tuple[torch.Tensor, ...]:
    """The coreset without and with outlier rejection, and seconds for the coreset and for the rejection."""
    count, patches = len(images), images[0, ..., 0].numel()
    size = images.numel() * 2
    store = EmbeddingStore(
        GreedyCoreset(ratio=ratio, random_state=seed, progress=False),
        torch.float16,
        count * patches,
        budget and budget * size,
    )
    found = {}

    def reject(bank: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor, row_numbers: torch.Tensor) -> torch.Tensor:
        found["bank"], found["began"] = bank, time.perf_counter()
        outliers = find_outliers(bank, numbers // patches, rows, row_numbers // patches, deviations)
        found["seconds"] = time.perf_counter() - found["began"]
        return outliers

    started = time.perf_counter()
    for image in images[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]:
        store.append(image.reshape(patches, -1))
    bank = store.reduce_to_bank(find_outliers=reject)
    return found["bank"], bank, found["began"] - started, found["seconds"]


def aurocs(bank: torch.Tensor, good: torch.Tensor, bad: torch.Tensor) -> list[float]:
    """Image AUROC by each score rule."""
    search = MemoryBank(bank.float().numpy())
    scores = {name: [] for name in RULES}
    for image in torch.cat([good, bad]):
        distances, _ = search.search(image.reshape(-1, image.shape[-1]).float().numpy(), 1)
        patch = torch.from_numpy(distances).reshape(1, *image.shape[:2])
        for name, rule in RULES.items():
            scores[name].append(float(image_score(patch, rule)))
    labels = [0] * len(good) + [1] * len(bad)
    return [roc_auc_score(labels, values) for values in scores.values()]


def line(images: torch.Tensor, good: torch.Tensor, bad: torch.Tensor, seed: int, **options: float | None) -> str:
    """Results of one training, as the cells of a table."""
    full, bank, coreset, rejection = train(images, seed, **options)
    pairs = zip(aurocs(full, good, bad), aurocs(bank, good, bad), strict=True)
    qualities = " | ".join(f"{without:.4f} | {with_:.4f}" for without, with_ in pairs)
    return f"{len(images)} | {len(full)} | {len(full) - len(bank)} | {qualities} | {coreset:.1f} | {rejection:.1f}"


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--seeds", default=3, show_default=True)
@click.option("--ratio", default=0.01, show_default=True, help="Share of the patches that the coreset keeps.")
@click.option("--budget", type=float, help="Memory for the embeddings, as a share of all of them.  [default: all]")
@click.option("--deviations", default=2.0, show_default=True, help="outlier_rejection")
def main(data: Path | None, seeds: int, **options: float | None) -> None:
    """Print the image AUROC without and with outlier rejection, on clean and on dirty training images."""
    click.echo(heading())
    qualities = "".join(f" | AUROC{rule} | with rejection" for rule in RULES)
    click.echo(f"data | seed | training images | coreset | left out{qualities} | coreset s | rejection s")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mono", "poly") if data is None else (data.name,):
            root = data or Path(folder) / name
            if data is None:
                lay_out(root, name)
            kinds = [f"test/{kind.name}" for kind in sorted((root / "test").iterdir()) if kind.name != "good"]
            train_good, test_good, defective = (embed(root, part) for part in (["train/good"], ["test/good"], kinds))
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                good, held = train_good, test_good
                if data is None:
                    normal = torch.cat([train_good, test_good])[rng.permutation(len(train_good) + len(test_good))]
                    good, held = normal[: len(train_good)], normal[len(train_good) :]
                order = rng.permutation(len(defective))
                count = round(len(good) / NORMAL_PER_DEFECTIVE)
                bad = defective[order[count:]]
                for images in (good, torch.cat([good, defective[order[:count]]])):
                    click.echo(f"{name} | {seed} | {line(images, held, bad, seed, **options)}")


if __name__ == "__main__":
    main()
