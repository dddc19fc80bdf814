"""What a region of interest is worth: cells with a date stamp in a corner, with and without it; and its search time.

    python tests/benchmarks/region.py

ELPV's monocrystalline cells, EfficientNet-Lite0, 1 %, best settings. Every image, to learn from and to test, has six random
digits in its upper left corner. Each seed draws the split and the digits.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import click
import numpy as np
from common import heading
from helpers.training import folder_datamodule, make_engine
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import roc_auc_score

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import find_images, read_image

BOX = 0.0, 0.0, 0.45, 0.15
"""Place of the stamp in the image, as the region of interest ignores it: left, top, right, bottom."""

SHARES = 1.0, 0.5, 0.25


def stamp(root: Path, seed: int) -> None:
    """Write six random digits onto each image below a folder."""
    rng, font = np.random.default_rng(seed), ImageFont.load_default(32)
    for path in find_images(root):
        picture = Image.open(path).copy()
        text = "".join(map(str, rng.integers(0, 10, 6)))
        ImageDraw.Draw(picture).text((8 + rng.integers(-4, 5), 4 + rng.integers(-3, 4)), text, fill=255, font=font)
        picture.save(path)


def train(root: Path, folder: Path, region: list[dict] | None) -> PatchcoreRuntime:
    """Train, export and load a model of the images in ``root/train/good``."""
    model = FaissPatchcore(
        backbone="efficientnet_lite0",
        layers=["blocks.2", "blocks.4"],
        coreset_sampling_ratio=0.01,
        score_smoothing=1,
        region_of_interest=region,
        visualizer=False,
    )
    make_engine(folder / "fit", limit_val_batches=0).fit(model, datamodule=folder_datamodule(root))
    return PatchcoreRuntime.load(export_bundle(model.eval(), folder / "bundle", index="flat"))


def auroc(runtime: PatchcoreRuntime, root: Path) -> float:
    """Image AUROC on the test images."""
    good, bad = (
        [prediction.score for prediction in runtime.stream(find_images(root / "test" / kind))]
        for kind in ("good", "defective")
    )
    return float(roc_auc_score([0] * len(good) + [1] * len(bad), good + bad))


@click.command()
@click.option("--seeds", default=3, show_default=True)
def main(seeds: int) -> None:
    """Print image AUROC, and milliseconds of the search by the share that is inspected."""
    click.echo(heading("openvino", "faiss-cpu"))
    click.echo("seed | no stamp | stamp | stamp, ignored by a region of interest | no stamp, the same region")
    for seed in range(seeds):
        cells = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for number, stamped in enumerate((False, True)):
                lay_out(folder / f"images{number}", seed=seed)
                if stamped:
                    stamp(folder / f"images{number}", seed)
            region = [{"rectangle": list(BOX), "ignore": True}]
            for number, (images, where) in enumerate(((0, None), (1, None), (1, region), (0, region))):
                root = folder / f"images{images}"
                cells.append(auroc(train(root, folder / f"model{number}", where), root))
        click.echo(f"{seed} | " + " | ".join(f"{cell:.4f}" for cell in cells))
    click.echo("inspected | milliseconds of the search | vectors")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder / "images")
        images = [read_image(path) for path in find_images(folder / "images/test/good")[:60]]
        for share in SHARES:
            region = None if share == 1 else [{"rectangle": [0, 0, 1, share]}]
            runtime = train(folder / "images", folder / f"share{share}", region)
            times = [prediction.milliseconds["search"] for prediction in runtime.predict(images)]
            click.echo(f"{share:.0%} | {statistics.median(times[5:]):.1f} | {len(runtime.bank)}")


if __name__ == "__main__":
    main()
