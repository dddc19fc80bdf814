"""The command ``patchcore predict``."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from patchcore_plugin.cli.common import device, fail_on, found_code, progress_bar
from patchcore_plugin.drawings import save_drawing
from patchcore_plugin.errors import UsageError, is_full_disk, reason_of
from patchcore_plugin.moving import replace
from patchcore_plugin.names import as_line, as_text, to_cell

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from patchcore_plugin.runtime import PatchcoreRuntime, Prediction
    from patchcore_plugin.runtime.prediction import Outcome

_PREDICTION_COLUMNS = "score", "normalized_score", "p_value", "verdict", "threshold", "ratio"
_REGION_COLUMNS = "regions", "small_regions", "largest_area", "largest_area_mm2", "largest_width_mm", "largest_height_mm"
_NAMED = 5  # unreadable files on the terminal; results.csv has them all
_COLUMNS = "image", *_PREDICTION_COLUMNS, *_REGION_COLUMNS, "error"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("predictions"),
    show_default=True,
    help="Folder for results.csv and heatmaps.",
)
@click.option("--heatmaps/--no-heatmaps", default=True, show_default=True, help="Write a heatmap PNG per image.")
@device
@fail_on
def predict(bundle: Path, folder: Path, output: Path, heatmaps: bool, device: str, fail_on: str | None) -> None:
    r"""Score every image below FOLDER with a BUNDLE.

    Writes results.csv (one row per image) and heatmaps/*.png, named as the images with .png added. An image that cannot be
    read, or whose heatmap cannot be written, has the reason in the column error; the others are scored, and the command ends
    with exit code 1. Heatmaps below FOLDER, of this run or an earlier one, are not scored.

    results.csv is UTF-8. A text that a spreadsheet would take for a formula, such as =1+1.png, has a ' before it, and so has
    a text that begins with ': to read a text, take one ' off its beginning. A byte of a name that is no UTF-8, such as E9,
    is written as \udce9. Until the last image is scored, the rows are in results.csv.part.
    """
    from patchcore_plugin.bundle import check_outside
    from patchcore_plugin.images import find_images
    from patchcore_plugin.runtime import PatchcoreRuntime

    runtime = PatchcoreRuntime.load(bundle, mode="throughput", device=device)
    check_outside(output, bundle)
    images = find_images(folder)
    inputs = {os.path.realpath(path) for path in images}
    output.mkdir(parents=True, exist_ok=True)
    verdicts: Counter[str | None] = Counter()
    unreadable = undrawn = 0
    with _open_results(output / "results.csv") as table, progress_bar() as bar:
        outcomes = bar.track(runtime.stream_outcomes(images), total=len(images), description="Predict")
        for path, outcome in zip(images, outcomes, strict=True):
            name, prediction = path.relative_to(folder), outcome.prediction
            if prediction is None:
                values, error = {}, str(outcome.error)
                unreadable += 1
                if unreadable <= _NAMED:
                    bar.console.print(as_line(error), markup=False, highlight=False, soft_wrap=True)
            else:
                values = {column: getattr(prediction, column) for column in _PREDICTION_COLUMNS}
                values |= _region_values(prediction)
                target = output / "heatmaps" / name.with_name(f"{name.name}.png")
                error = _write_heatmap(runtime, outcome, target, inputs) if heatmaps else ""
                verdicts[prediction.verdict] += 1
                undrawn += bool(error)
            table.writerow({"image": to_cell(as_text(name.as_posix())), **values, "error": to_cell(as_text(error))})
    left = f", {undrawn} without a heatmap" if undrawn else ""
    review = "" if runtime.manifest.image.review is None else f", {verdicts['review']} to review"
    click.echo(
        f"{len(images)} images: {verdicts['anomalous']} anomalous{review}, {unreadable} unreadable{left}. "
        f"Results: {output / 'results.csv'}"
    )
    sys.exit(1 if unreadable or undrawn else found_code(fail_on, verdicts))


def _region_values(prediction: Prediction) -> dict[str, float | None]:
    """The number of regions, and the size of the one with the largest area."""
    if prediction.regions is None:
        return {}
    largest = max(prediction.regions, key=lambda region: region.area, default=None)
    mm = largest and largest.mm
    sizes = (mm.area, mm.width, mm.height) if mm else (None, None, None)
    values = len(prediction.regions), prediction.small_regions, largest and largest.area, *sizes
    return dict(zip(_REGION_COLUMNS, values, strict=True))


@contextmanager
def _open_results(file: Path) -> Iterator[csv.DictWriter[str]]:
    """Open the table of results; the file is there once it is whole, and until then its rows are in a file beside it."""
    _check_replaceable(file)
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("w", buffering=1, newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, _COLUMNS)
            table.writeheader()
            yield table
    except OSError as error:
        error.filename = error.filename or str(part)
        raise
    replace(part, file)


def _check_replaceable(file: Path) -> None:
    """Refuse to replace a file of another kind, and find out before the work whether another program holds it."""
    if file.exists():
        header = ",".join(_COLUMNS).encode()
        with file.open("r+b") as earlier:
            begin = earlier.read(len(header))
        if begin and begin != header:
            msg = f"{file} is there already, and was not written by patchcore predict. Choose another --output."
            raise UsageError(msg)


def _write_heatmap(runtime: PatchcoreRuntime, outcome: Outcome, target: Path, inputs: Collection[str]) -> str:
    """Write the heatmap of an image.

    Args:
        runtime: The runtime that scored the image.
        outcome: The image, and its prediction.
        target: File to write.
        inputs: Real paths of all images, which are never written over.

    Returns:
        Why the heatmap cannot be written; empty if it is.

    Raises:
        OSError: If the disk is full: the other heatmaps could not be written either.
    """
    try:
        if os.path.realpath(target) in inputs:
            return f"Its heatmap would replace the image {target}."
        target.parent.mkdir(parents=True, exist_ok=True)
        save_drawing(runtime.heatmap(outcome.pixels, outcome.prediction), target)
    except (OSError, ValueError, MemoryError) as error:  # a system may refuse a name by a ValueError
        if is_full_disk(error):
            error.filename = str(target)
            raise
        return f"Its heatmap {target} cannot be written: {reason_of(error)}."
    return ""
