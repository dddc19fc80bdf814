"""Image AUROC of models that were trained on few normal images. EfficientNet-Lite0, 256 x 256 pixels.

    python tests/benchmarks/few_images.py                      # ELPV's monocrystalline cells
    python tests/benchmarks/few_images.py --kind poly
    python tests/benchmarks/few_images.py --data MTD_FOLDER    # a folder with train/good, test/good and test/DEFECT
    python tests/benchmarks/few_images.py --choose --vary small_turns # with test images that are turned, by up to 5 degrees
    python tests/benchmarks/few_images.py --choose --kind poly # how the settings of configs/few_images.yaml were chosen

The images are divided in two halves at random: settings are chosen on one (`--choose`), and compared on the other. Of each
half, 80 normal and 80 defective images are the test. Each draw takes its training images from the other normal ones; of its
32 images, the first are those of the smaller numbers. Each image and each copy is embedded once. A cell of the table is the
mean and the standard deviation over the draws. anomalib's row is its own Patchcore: its embeddings, its sampler and
its scores.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from anomalib.data.utils import read_image
from anomalib.models import Patchcore
from common import LAYERS, heading
from rich.progress import track
from sklearn.metrics import roc_auc_score

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import find_images
from patchcore_plugin.model.augmentation import AUGMENTATIONS, Change, PixelScale, changes_of

TEST_IMAGES = 80  # of each kind
BATCH = 8
ANOMALIB = "anomalib Patchcore"
CONFIG = Path(__file__).parents[2] / "configs/few_images.yaml"
PAPER = {"backbone": "efficientnet_lite0", "layers": LAYERS, "coreset_sampling_ratio": 0.1, "normalization": "imagenet"}
BEST = {**PAPER, "normalization": "backbone", "score_smoothing": 1}
FEW = yaml.safe_load(CONFIG.read_text("utf-8"))["model"]["init_args"]
COMPARED: dict[str, dict[str, Any] | None] = {
    ANOMALIB: None,
    "ours, paper's settings": PAPER,
    "ours, best settings": BEST,
    "configs/few_images.yaml": FEW,
}
CHOSEN_FROM: dict[str, dict[str, Any] | None] = {
    "best settings": BEST,
    "no smoothing": {**BEST, "score_smoothing": 0},
    "1 % of the patches": {**BEST, "coreset_sampling_ratio": 0.01},
    "all patches": {**BEST, "coreset_sampling_ratio": 1.0},
    **{name: {**BEST, "augmentations": [name]} for name in AUGMENTATIONS},
    "mirror, flip": {**BEST, "augmentations": ["mirror", "flip"]},
    "mirror, flip, half_turn": {**BEST, "augmentations": ["mirror", "flip", "half_turn"]},
    "mirror, flip, brightness": {**BEST, "augmentations": ["mirror", "flip", "brightness"]},
    "all of them": {**BEST, "augmentations": list(AUGMENTATIONS)},
}

Scorer = Callable[[list[int]], np.ndarray]
"""Scores of the test images by a model that was trained on some images, which are given by their numbers."""


def images_of(data: Path, *, choose: bool) -> tuple[list[Path], list[Path]]:
    """Normal and defective images of a half of the data."""
    paths = sorted({*find_images(data / "train"), *find_images(data / "test")}, key=lambda path: path.name)
    halves = []
    for good in (True, False):
        kind = [path for path in paths if (path.parent.name == "good") == good]
        random.Random(0).shuffle(kind)
        halves.append(kind[not choose :: 2])
    return halves[0], halves[1]


def read(paths: list[Path]) -> torch.Tensor:
    """Images (N, 3, 256, 256), float32, in [0, 1]."""
    images = (read_image(path, as_tensor=True) for path in paths)
    resize = FaissPatchcore.configure_pre_processor().transform.transforms[0]
    return torch.stack([resize(image) for image in images])


def vary(images: torch.Tensor, what: str) -> torch.Tensor:
    """Change each of some images (N, 3, H, W) at random, as production may, up to as much as the copies are changed."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(-1, 1, len(images)).tolist()
    changes = [Change(degrees=5 * a) if what == "small_turns" else Change(brightness=1 + 0.2 * a) for a in amounts]
    scale = PixelScale.of(None)
    return torch.cat([change.apply(image[None], scale) for change, image in zip(changes, images, strict=True)])


class Embeddings:
    """Embeddings of images and of their copies, made once for each normalization.

    Args:
        train: Images (N, 3, 256, 256) that draws take.
        test: Test images (M, 3, 256, 256).
    """

    def __init__(self, train: torch.Tensor, test: torch.Tensor) -> None:
        self.train, self.test = train, test
        self._kept: dict[Any, torch.Tensor] = {}

    def of(self, model: FaissPatchcore, change: Any = None, *, test: bool = False) -> torch.Tensor:
        """Embeddings (N, 32, 32, D) of the training images or, where there is a change, of their copies; or of the tests."""
        transform = model.pre_processor.transform
        key = str(transform), change, test
        if key not in self._kept:
            batches = []
            for images in (self.test if test else self.train).split(BATCH):
                shown = transform(images)
                shown = shown if change is None else change.apply(shown, PixelScale.of(transform))
                batches.append(model.model.embed(shown))
            self._kept[key] = torch.cat(batches)
        return self._kept[key]


def our_scorer(arguments: dict[str, Any], embeddings: Embeddings) -> Scorer:
    """Our model with some arguments."""
    model = FaissPatchcore(**arguments).eval()
    names = arguments.get("augmentations", [])
    train = torch.stack([embeddings.of(model, change) for change in (None, *changes_of(names))], dim=1)
    test = embeddings.of(model, test=True)
    sampler = GreedyCoreset(ratio=model.coreset_sampling_ratio, random_state=0, progress=False)

    def score(chosen: list[int]) -> np.ndarray:
        rows = train[chosen].flatten(0, -2)
        model.model.memory_bank = rows if sampler.ratio == 1 else rows[sampler.fit(rows)]
        return torch.cat([model.model.score(batch, (32, 32)).pred_score for batch in test.split(BATCH)]).numpy()

    return score


def anomalib_scorer(embeddings: Embeddings) -> Scorer:
    """anomalib's Patchcore with the paper's settings and the same weights."""
    patchcore = Patchcore(backbone="tf_efficientnet_lite0", layers=LAYERS, pre_trained=False, evaluator=False)
    weights = FaissPatchcore(**PAPER).model.feature_extractor.net.state_dict()
    patchcore.model.feature_extractor.feature_extractor.load_state_dict(weights)
    model, transform = patchcore.model.train(), patchcore.pre_processor.transform

    def embed(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(transform(batch)) for batch in images.split(BATCH)]).reshape(len(images), 1024, -1)

    train, test = embed(embeddings.train), embed(embeddings.test)

    def score(chosen: list[int]) -> np.ndarray:
        torch.manual_seed(0)
        model.embedding_store = [train[chosen].flatten(0, 1)]
        model.subsample_embedding(0.1)
        scores = []
        for batch in test.split(BATCH):
            rows = batch.flatten(0, 1)
            distances, places = (found.reshape(len(batch), -1) for found in model.nearest_neighbors(rows, 1))
            scores.append(model.compute_anomaly_score(distances, places, rows))
        return torch.cat(scores).numpy()

    return score


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--kind", type=click.Choice(["mono", "poly"]), default="mono", show_default=True, help="Cells of ELPV.")
@click.option("--choose", is_flag=True, help="Compare what was chosen from, on the other half of the images.")
@click.option("--vary", "varied", type=click.Choice(["small_turns", "brightness"]), help="Change the test images so.")
@click.option("--images", type=int, multiple=True, default=(1, 2, 4, 8, 16, 32), show_default=True)
@click.option("--draws", default=10, show_default=True)
@click.option("--only", multiple=True, help="A row of the table; may be repeated.  [default: all]")
@torch.inference_mode()
def main(
    data: Path | None,
    kind: str,
    choose: bool,
    varied: str | None,
    images: tuple[int, ...],
    draws: int,
    only: tuple[str, ...],
) -> None:
    """Print the image AUROC for numbers of normal training images."""
    click.echo(heading())
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder)
            lay_out(data, kind)
        normal, defective = images_of(data, choose=choose)
        tests, pool = [*normal[:TEST_IMAGES], *defective[:TEST_IMAGES]], normal[TEST_IMAGES:]
        orders = [np.random.default_rng(draw).permutation(len(pool))[: max(images)] for draw in range(draws)]
        used = np.unique(orders)
        orders = np.searchsorted(used, orders)
        test = vary(read(tests), varied) if varied else read(tests)
        embeddings = Embeddings(read([pool[number] for number in used]), test)
    click.echo(f"{len(pool)} normal images to draw from, {len(tests)} test images, {draws} draws")
    labels = np.arange(len(tests)) >= min(TEST_IMAGES, len(normal))
    click.echo(" | ".join(("settings", *(f"{count} images" for count in images))))
    for name, arguments in (CHOSEN_FROM if choose else COMPARED).items():
        if only and name not in only:
            continue
        score = anomalib_scorer(embeddings) if arguments is None else our_scorer(arguments, embeddings)
        cells = []
        for count in images:
            found = [roc_auc_score(labels, score(order[:count].tolist())) for order in track(orders, f"{name}, {count}")]
            cells.append(f"{np.mean(found):.3f} ± {np.std(found):.3f}")
        click.echo(" | ".join((name, *cells)))


if __name__ == "__main__":
    main()
