"""Time of vision transformers in OpenVINO, in each precision, beside torch.

    python tests/benchmarks/transformers.py                # 448 x 448 pixels
    python tests/benchmarks/transformers.py --size 224

The weights are random: times do not depend on them, errors do. Images are solar cells: 8 in the bank, 16 others to measure
on, half of which calibrate int8. Times are medians for one image, its resize included.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from anomalib.data.utils import read_image
from common import heading
from rich.console import Console
from rich.table import Table

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.bundle import read_manifest
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle

BACKBONES = {
    "vit_small_patch14_dinov2": ["blocks.5", "blocks.8"],
    "vit_small_patch16_dinov3": ["blocks.5", "blocks.8"],
    "swin_tiny_patch4_window7_224": ["layers.1", "layers.2"],
}


def torch_milliseconds(model: FaissPatchcore, paths: list[Path]) -> float:
    """Milliseconds from an image to its embeddings in torch."""
    times = []
    for path in paths:
        image = read_image(path, as_tensor=True)[None]
        started = time.perf_counter()
        model.model.embed(model.pre_processor.transform(image))
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[1:]))


@click.command()
@click.option("--size", default=448, show_default=True, help="Height and width of the network's input.")
@click.option("--only", type=click.Choice(list(BACKBONES)), multiple=True, help="Backbones to measure.  [default: all]")
def main(size: int, only: tuple[str, ...]) -> None:
    """Print milliseconds for an image, and for bf16 and int8 rank correlation and mean error of the scores."""
    click.echo(heading("timm", "openvino", "nncf"))
    logging.getLogger("patchcore_plugin").setLevel(logging.ERROR)  # the weights are random
    columns = ("backbone", "layers", "grid", "torch", "f32", "torch/f32", "bf16: ms, r, error", "int8: ms, r, error")
    table = Table(*columns, title=f"{size} x {size} pixels")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_out(folder / "elpv")
        learned, measured = (sorted((folder / "elpv" / part).iterdir())[:16] for part in ("train/good", "test/good"))
        for name in only or BACKBONES:
            torch.manual_seed(0)
            layers = BACKBONES[name]
            model = FaissPatchcore(backbone=name, layers=layers, pre_trained=False, image_size=(size, size)).eval()
            parts = [
                model.model.embed(model.pre_processor.transform(read_image(path, as_tensor=True)[None]))
                for path in learned[:8]
            ]
            vectors = torch.cat(parts).flatten(0, 2)
            model.model.memory_bank = vectors[torch.randperm(len(vectors))[: len(vectors) // 100]]
            spent = torch_milliseconds(model, measured[:6])
            bundle = export_bundle(model, folder / name, index="flat", precision="auto", images=measured)
            manifest = read_manifest(bundle)
            trials = {trial.precision: trial for trial in manifest.precision_trials}
            cells = [
                f"{trial.milliseconds:.0f}, {trial.correlation:.3f}, {trial.error:.1%}" if trial else "not on this CPU"
                for trial in (trials.get("bf16"), trials.get("int8"))
            ]
            shape = f"{manifest.grid[0]} x {manifest.grid[1]}, {manifest.embedding_dimension}"
            f32 = trials["f32"].milliseconds
            table.add_row(name, ", ".join(layers), shape, f"{spent:.0f}", f"{f32:.0f}", f"{spent / f32:.1f}", *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
