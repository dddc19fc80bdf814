"""What an ensemble costs in use: time for an image, and size of the bundle, beside the sum of its parts.

    python tests/benchmarks/ensemble.py

Trains the models of ensemble.yaml on ELPV's monocrystalline cells, exports them, and scores test images by turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import yaml
from common import heading
from helpers.training import folder_datamodule, make_engine

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import find_images, read_image

CONFIG = Path(__file__).with_name("ensemble.yaml")
PARTS = "Lite0", "Lite1", "Lite2"


@click.command()
@click.option("--turns", type=click.IntRange(min=1), default=60, show_default=True, help="Images that each model scores.")
def main(turns: int) -> None:
    """Print milliseconds and mebibytes of each model."""
    click.echo(heading("openvino"))
    models = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["models"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lay_out(root)
        runtimes, sizes = {}, {}
        for number, (name, model) in enumerate(models.items()):
            fitted = FaissPatchcore(**model["init_args"])
            make_engine(root / f"fit{number}", limit_val_batches=0).fit(fitted, datamodule=folder_datamodule(root))
            bundle = export_bundle(fitted.eval(), root / f"bundle{number}", images=find_images(root / "test/good")[:64])
            runtimes[name] = PatchcoreRuntime.load(bundle)
            sizes[name] = sum(path.stat().st_size for path in bundle.iterdir()) / 2**20
        images = [read_image(path) for path in find_images(root / "test")[:turns]]
        times = {name: [] for name in runtimes}
        for image in [images[0], *images]:
            for name, runtime in runtimes.items():
                started = time.perf_counter()
                runtime.predict([image])
                times[name].append(1000 * (time.perf_counter() - started))
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    parts, size = sum(middle[name] for name in PARTS), sum(sizes[name] for name in PARTS)
    click.echo("model | milliseconds an image | of the sum of Lite0, 1 and 2 | bundle, MiB | of the sum")
    for name in models:
        shown = f"{middle[name]:.1f} | {middle[name] / parts:.2f} | {sizes[name]:.1f} | {sizes[name] / size:.2f}"
        click.echo(f"{name} | {shown}")


if __name__ == "__main__":
    main()
