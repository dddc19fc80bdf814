"""Images a second of the work on folders, decoding included, against those of the network alone.

    python tests/benchmarks/offline.py BUNDLE FOLDER --turns 5

FOLDER has normal images. The network alone works on images that are decoded, as many at once as there are threads; `search`
is score and map of the embeddings in the same way. `update` writes no new index where none is needed, and its time has the
loading of the bundle in it, as that of `validate` has.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from common import heading
from rich.console import Console
from rich.progress import track
from rich.table import Table

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.cpu import cores
from patchcore_plugin.images import find_images, read_image
from patchcore_plugin.operations.update import update_bundle
from patchcore_plugin.operations.validation import validate_bundle

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--turns", default=5, show_default=True, help="How often all are measured, by turns.")
def main(bundle: Path, folder: Path, turns: int) -> None:
    """Print medians of images a second, and of their shares of the network's in the same turn."""
    click.echo(heading("openvino", "faiss-cpu"))
    images = find_images(folder)
    runtime = PatchcoreRuntime.load(bundle, mode="throughput")
    pixels = [read_image(path, intensity_range=runtime.intensity_range) for path in images]
    embeddings = [runtime.embed([image]) for image in pixels]
    count = 0

    def update() -> None:
        nonlocal count
        count += 1
        update_bundle(bundle, images, Path(temporary) / str(count))

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(cores()) as pool:
        works: dict[str, Callable[[], object]] = {
            "network alone": lambda: list(pool.map(lambda image: runtime.embed([image]), pixels)),
            "decoding alone": lambda: list(pool.map(read_image, images)),
            "search alone": lambda: list(pool.map(lambda found: runtime.bank.score(found, runtime.rule), embeddings)),
            "predict, without heatmaps": lambda: [outcome.prediction for outcome in runtime.stream_outcomes(images)],
            "validate": lambda: validate_bundle(bundle, images),
            "update": update,
        }
        rates: dict[str, list[float]] = {name: [] for name in works}
        for turn in track(range(turns), description="Turns"):
            for name in list(works)[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                works[name]()
                rates[name].append(len(images) / (time.perf_counter() - started))
    table = Table("work", "images/s", "of the network alone")
    for name, found in rates.items():
        share = np.median(np.divide(found, rates["network alone"]))
        table.add_row(name, f"{np.median(found):.1f}", f"{share:.0%}")
    Console(width=125).print(table)
    click.echo(f"{len(images)} images, medians of {turns} turns")


if __name__ == "__main__":
    main()
