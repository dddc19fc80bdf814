"""How to look at large parts: the whole image made smaller, or tiles of it.

    python tests/benchmarks/tiles.py                      # panels of ELPV's monocrystalline cells
    python tests/benchmarks/tiles.py --data MTD_FOLDER    # of magnetic tiles, with masks
    python tests/benchmarks/tiles.py --megapixels 24      # memory and time of one image, with the first row of tiles

A panel is a picture of 2,048 x 2,448 pixels of 6 x 8 images side by side; in a defective panel, one of them has a defect.
EfficientNet-Lite0, 1 % of the patches, best settings, 8 normal panels to learn from. AUPRO is taken on maps and masks of a
quarter of the size. Time and memory are those of a process of its own that loads the bundle and scores panels one by one:
the median of ten, and the growth of its peak by the first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import LAYERS, heading
from helpers.training import folder_datamodule, make_engine
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.evaluation.metrics import pixel_metrics
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import find_images

HEIGHT, WIDTH, ROWS, COLUMNS = 2048, 2448, 6, 8
PANELS = {"train/good": 8, "test/good": 30, "test/defective": 60}
SETTINGS: dict[str, dict[str, Any]] = {
    "whole, 256 x 306": {"image_size": (256, 306)},
    "whole, 1,024 x 1,224": {"image_size": (1024, 1224)},
    "tiles of 256": {"image_size": (HEIGHT, WIDTH), "tile_size": 256},
    "tiles of 512": {"image_size": (HEIGHT, WIDTH), "tile_size": 512},
    "tiles of 512, every 448": {"image_size": (HEIGHT, WIDTH), "tile_size": 512, "tile_stride": 448},
}
MEASURE = """
import json, re, sys, time
from pathlib import Path
from patchcore_plugin import PatchcoreRuntime
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
bundle, *images = sys.argv[1:]
runtime, times = PatchcoreRuntime.load(bundle), []
before = peak()
runtime.predict(images[:1])[0].regions
after = peak()
for image in images[1:]:
    started = time.perf_counter()
    runtime.predict([image])[0].regions
    times.append(1000 * (time.perf_counter() - started))
print(json.dumps({"MiB": after - before, "all": after, "ms": sorted(times)[len(times) // 2]}))
"""


def make_panels(source: Path, root: Path, seed: int) -> None:
    """Write panels of the images below train/good, test/good and test/DEFECT, and masks where there are some."""
    rng = np.random.default_rng(seed)
    good = {part: rng.permutation(find_images(source / part)) for part in ("train/good", "test/good")}
    bad = [path for path in find_images(source / "test") if path.parent.name != "good"]
    edges = np.linspace(0, HEIGHT, ROWS + 1).round().astype(int), np.linspace(0, WIDTH, COLUMNS + 1).round().astype(int)
    for part, count in PANELS.items():
        for number in range(count):
            images = good["test/good" if part != "train/good" else part]
            chosen = rng.choice(images, ROWS * COLUMNS, replace=len(images) < ROWS * COLUMNS)
            mask = Image.new("L", (WIDTH, HEIGHT))
            place = rng.integers(ROWS * COLUMNS) if part == "test/defective" else None
            if place is not None:
                chosen[place] = bad[rng.integers(len(bad))]
            panel = Image.new("L", (WIDTH, HEIGHT))
            for cell, path in enumerate(chosen):
                row, column = divmod(cell, COLUMNS)
                (top, bottom), (left, right) = edges[0][row : row + 2], edges[1][column : column + 2]
                panel.paste(Image.open(path).convert("L").resize((right - left, bottom - top)), (left, top))
                truth = source / "ground_truth" / path.parent.name / f"{path.stem}.png"
                if cell == place and truth.exists():
                    shown = Image.open(truth).convert("L").resize((right - left, bottom - top), Image.Resampling.NEAREST)
                    mask.paste(shown.point(lambda value: 255 * (value > 0)), (left, top))
            for picture, folder in ((panel, part), (mask, "ground_truth/defective")):
                if picture is panel or (place is not None and mask.getbbox()):
                    (root / folder).mkdir(parents=True, exist_ok=True)
                    picture.save(root / folder / f"{number:03}.png")


def train(root: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """Train and export a model of the panels in ``root/train/good``."""
    model = FaissPatchcore(
        backbone="efficientnet_lite0", layers=LAYERS, coreset_sampling_ratio=0.01, score_smoothing=1, visualizer=False,
        **settings,
    )  # fmt: skip
    datamodule = folder_datamodule(root, train_batch_size=1)
    make_engine(folder / "fit", limit_val_batches=0).fit(model, datamodule=datamodule)
    return export_bundle(model.eval(), folder / "bundle", images=find_images(root / "test/good")[:2])


def rescaled(bundle: Path, folder: Path, megapixels: float) -> Path:
    """Export a bundle's bank anew, with the settings of the first row of tiles, for a larger input."""
    side = int((megapixels * 1e6 / 6) ** 0.5)
    model = FaissPatchcore(
        backbone="efficientnet_lite0", layers=LAYERS, score_smoothing=1, image_size=(2 * side, 3 * side), tile_size=256
    )
    model.model.memory_bank = torch.from_numpy(PatchcoreRuntime.load(bundle).bank.vectors.copy())
    return export_bundle(model.eval(), folder / "large", index="bfloat16")


def measure(bundle: Path, images: list[Path]) -> dict[str, float]:
    """Milliseconds and MiB of a process that scores images."""
    command = [sys.executable, "-c", MEASURE, str(bundle), *map(str, images)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def evaluate(bundle: Path, root: Path) -> dict[str, float]:
    """Image AUROC, and with masks pixel AUROC and AUPRO, on the test panels."""
    scores, maps, masks = [], [], []
    good, bad = (find_images(root / "test" / kind) for kind in ("good", "defective"))
    for path, answer in zip([*good, *bad], PatchcoreRuntime.load(bundle).stream([*good, *bad]), strict=True):
        scores.append(answer.score)
        truth = root / "ground_truth/defective" / path.name
        if path.parent.name == "good" or truth.exists():
            small = Image.fromarray(answer.anomaly_map).resize((WIDTH // 4, HEIGHT // 4), Image.Resampling.BILINEAR)
            maps.append(np.asarray(small))
            mask = Image.open(truth) if path.parent.name != "good" else Image.new("L", (WIDTH, HEIGHT))
            masks.append(np.asarray(mask.resize(small.size, Image.Resampling.NEAREST)) > 0)
    found = {"AUROC": float(roc_auc_score([0] * len(good) + [1] * len(bad), scores))}
    if any(mask.any() for mask in masks):
        found |= pixel_metrics(np.stack(masks), np.stack(maps))
    return found


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--seeds", default=1, show_default=True)
@click.option("--only", multiple=True, help="A row of the table; may be repeated.  [default: all]")
@click.option("--cost", is_flag=True, help="Measure time and memory alone.")
@click.option("--megapixels", type=float, help="Measure one image of this size instead.")
def main(data: Path | None, seeds: int, only: tuple[str, ...], cost: bool, megapixels: float | None) -> None:
    """Print AUROC, AUPRO, milliseconds and MiB of whole images and of tiles."""
    click.echo(heading("openvino", "faiss-cpu"))
    table = Table("settings", "seed", "image AUROC", "AUPRO", "ms", "MiB of an image", "MiB of the process")
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if data is None:
                lay_out(folder / "elpv", "mono", seed)
            make_panels(data or folder / "elpv", folder / "panels", seed)
            if megapixels is not None:
                bundle = train(folder / "panels", folder / "tiles", SETTINGS["tiles of 256"])
                image = folder / "large.png"
                panel = Image.open(find_images(folder / "panels/test/good")[0])
                large = rescaled(bundle, folder, megapixels)
                height, width = PatchcoreRuntime.load(large).manifest.preprocessing.size
                panel.resize((width, height)).convert("RGB").save(image)
                click.echo(f"{width} x {height} pixels: {measure(large, [image] * 4)}")
                return
            for row, settings in SETTINGS.items():
                if only and row not in only:
                    continue
                bundle = train(folder / "panels", folder / row, settings)
                spent = measure(bundle, find_images(folder / "panels/test/good")[:11])
                found = {} if cost else evaluate(bundle, folder / "panels")
                shown = [f"{found[name]:.4f}" if name in found else "" for name in ("AUROC", "aupro")]
                table.add_row(row, str(seed), *shown, *(f"{spent[name]:.0f}" for name in ("ms", "MiB", "all")))
                click.echo(f"{row}, seed {seed}: {found} {spent}")
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
