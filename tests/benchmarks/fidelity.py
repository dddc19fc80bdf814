"""Are the scores the same after export? Image AUROC of torch, and of bundles with every index, storage and precision.

    python tests/benchmarks/fidelity.py                      # ELPV's monocrystalline cells
    python tests/benchmarks/fidelity.py --data MTD_FOLDER    # a folder with train/good, test/good and test/DEFECT

The script trains at 1 % through anomalib's Engine, and scores all test images with torch and with each bundle.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from common import LAYERS, heading
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import BundleError
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import find_images

BUNDLES = {
    "f32, flat": {"index": "flat"},
    "f32, auto index": {},
    "auto precision and index": {"precision": "auto"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8"},
    "float16 bank": {"storage": "float16"},
    "int8 bank": {"storage": "int8"},
}


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--ratio", default=0.01, show_default=True)
def main(data: Path | None, ratio: float) -> None:
    """Print AUROC, error of the scores, time for an image, and size of every bundle."""
    click.echo(heading("openvino", "faiss-cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if data is None:
            data = folder / "elpv"
            lay_out(data)
        images = find_images(data / "test")
        labels = [image.parent.name != "good" for image in images]
        model = FaissPatchcore(
            backbone="efficientnet_lite0",
            layers=LAYERS,
            normalization="imagenet",
            coreset_sampling_ratio=ratio,
            visualizer=False,
            evaluator=False,
        )
        defects = [f"test/{path.name}" for path in sorted((data / "test").iterdir()) if path.name != "good"]
        datamodule = Folder(
            name="data", root=data, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir=defects,
            num_workers=0, val_split_mode="same_as_test",
        )  # fmt: skip
        engine = Engine(default_root_dir=folder / "results", accelerator="cpu", devices=1, logger=False)
        engine.fit(model, datamodule=datamodule)
        model.eval()
        expected = []
        with torch.no_grad():
            for image in track(images, description="torch"):
                pixels = model.pre_processor.transform(read_image(image, as_tensor=True)[None])
                expected.append(float(model.model(pixels).pred_score))
        expected = np.array(expected)
        base = roc_auc_score(labels, expected)
        table = Table("bundle", "index", "precision", "AUROC", "against torch", "mean error", "ms an image", "MiB")
        table.add_row("torch", "", "", f"{base:.4f}", "", "", "", "")
        for number, (title, options) in enumerate(BUNDLES.items()):
            try:
                path = export_bundle(model, folder / str(number), **options)
            except BundleError as error:
                click.echo(f"{title}: {error}")
                continue
            runtime = PatchcoreRuntime.load(path)
            times, scores = [], []
            for image in track(images, description=title):
                started = time.perf_counter()
                scores.append(runtime.predict([image])[0].score)
                times.append(time.perf_counter() - started)
            error = np.mean(np.abs(scores - expected) / expected)
            auroc = roc_auc_score(labels, scores)
            size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
            index = runtime.manifest.index
            table.add_row(
                title, f"{index.kind} {index.width or ''} {index.storage}", runtime.manifest.precision, f"{auroc:.4f}",
                f"{auroc - base:+.4f}", f"{error:.1e}", f"{1000 * np.median(times):.1f}", f"{size:.1f}",
            )  # fmt: skip
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
