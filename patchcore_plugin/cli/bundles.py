"""Commands about a bundle: ``patchcore info``, ``validate``, ``explain``, ``benchmark`` and ``pack``."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Column, Table

from patchcore_plugin.cli.common import as_cell, device, print_trials, step_bars
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import Manifest, Scale
    from patchcore_plugin.operations.validation import ValidationReport
    from patchcore_plugin.runtime import Prediction
    from patchcore_plugin.runtime.explain import Reason

_bundle = click.argument("bundle", type=click.Path(path_type=Path))
_folder = click.argument("folder", type=click.Path(path_type=Path))

_SHOWN_PARTS = 4  # of a region of interest


@click.command(epilog="Example: patchcore info bundle")
@_bundle
def info(bundle: Path) -> None:
    """Show what a BUNDLE is.

    Prints its model, memory bank, thresholds, files and origin. Its manifest.json has every detail.
    """
    from patchcore_plugin.bundle import read_manifest_and_version

    manifest, version = read_manifest_and_version(bundle)
    table = Table(show_header=False)
    for name, text in _summary(manifest, version):
        table.add_row(name, as_cell(text))
    Console().print(table)
    if manifest.precision_trials or any(member.index.trials for member in manifest.all_members):
        click.echo("Measured when the bundle was written:")
        print_trials(manifest)


def _summary(manifest: Manifest, version: str) -> Iterator[tuple[str, str]]:
    from patchcore_plugin.bundle import FILES, ORIGINS, THUMBNAILS
    from patchcore_plugin.scoring import ScoreRule

    recipe = manifest.preprocessing
    yield "name", manifest.name
    yield "version", f"{version} (format {manifest.format_version})"
    yield "created", f"{manifest.created:%Y-%m-%d %H:%M %Z}"
    for member in manifest.all_members:
        yield "backbone", f"{member.backbone}, layers {', '.join(member.layers)}, in {manifest.precision}"
    crop = "" if recipe.crop is None else f", of which the middle {_width_by_height(recipe.crop)}"
    patches = f"{_width_by_height(manifest.grid)} patches"
    if recipe.intensity_range is None:
        yield "images", "of 8 bits"
    else:
        yield "images", f"deeper than 8 bits: values {recipe.intensity_range} become 0 to 255"
    yield "input", f"resized to {_width_by_height(recipe.resize)} pixels{crop}; {patches}"
    if recipe.tiles is not None:
        size, stride = map(_width_by_height, (recipe.tiles.size, recipe.tiles.stride))
        count = len(recipe.tiles.places(recipe.size, recipe.region and recipe.region.pixels))
        yield "tiles", f"{count} of {size} pixels, one every {stride}"
    if recipe.region is not None:
        inspected = len(recipe.region.patches(manifest.grid)) / (manifest.grid[0] * manifest.grid[1])
        shares = f"{recipe.region.share:.0%} of the input, {inspected:.0%} of the patches"
        yield "region of interest", f"{shares}; {_parts(recipe.region.pixels)}"
    for member in manifest.all_members:
        radius = "unknown" if member.covering_radius is None else f"{member.covering_radius:.4g}"
        weight = f", distances x {member.weight:.3g}" if manifest.members else ""
        yield "memory bank", f"{member.bank_size:,} x {member.embedding_dimension}, covering radius {radius}{weight}"
        index = member.index
        yield "index", f"{index.kind} in {index.storage}" + (f", width {index.width}" if index.width else "")
    yield "image score", str(ScoreRule.of(manifest))
    yield from _reading(manifest)
    known = "image, row and column of each bank vector" if ORIGINS in manifest.files else "unknown"
    yield "origins", known + (", with thumbnails" if THUMBNAILS in manifest.files else "")
    yield "self-test", "none" if manifest.self_test is None else f"{len(manifest.self_test.scores)} scores"
    for update in manifest.lineage:
        taught = f", and {update.defects} patches of defects" if update.defects else ""
        added = f"{update.images} images added {update.vectors} vectors{taught}"
        yield "update", f"{update.date:%Y-%m-%d}: {added} to {update.parent}"
    for name, file in manifest.files.items():
        yield name, f"{FILES[name].content}, {file.bytes / 2**20:.2f} MiB"
    yield "written with", ", ".join(f"{package} {number}" for package, number in manifest.versions.items())


def _parts(inspected: NDArray[np.bool_]) -> str:
    """Boxes around the parts of a region of interest, or around those that it leaves out: whichever cover less."""
    from patchcore_plugin.scoring.regions import find_regions

    inside, outside = (find_regions(part.astype("float32"), 0) for part in (inspected, ~inspected))
    covered = [sum(box.width * box.height for box in boxes) for boxes in (inside, outside)]
    kind, boxes = ("inspects", inside) if covered[0] < covered[1] or not outside else ("leaves out", outside)
    boxes = sorted(boxes, key=lambda box: -box.area)
    height, width = inspected.shape
    shown = [
        "[" + ", ".join(f"{edge / side:.2g}" for edge, side in zip(box.corners, (width, height) * 2, strict=True)) + "]"
        for box in boxes[:_SHOWN_PARTS]
    ]
    more = f" and {len(boxes) - _SHOWN_PARTS} more" if len(boxes) > _SHOWN_PARTS else ""
    return f"{kind} {', '.join(shown)}{more} (left, top, right, bottom)"


def _reading(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """How scores are read: thresholds, regions, and what they promise."""
    from patchcore_plugin.scoring.conformal import describe_promise
    from patchcore_plugin.scoring.thresholds import raw_review_threshold

    yield "image threshold", _threshold(manifest.image)
    if manifest.regions is not None:
        side = manifest.regions.mm_per_pixel
        known = "pixels of an unknown size" if side is None else f"pixels of {side:g} mm"
        unit = "pixels" if side is None else "mm²"
        least = f"; those below {manifest.regions.min_area:g} {unit} are not listed" if manifest.regions.min_area else ""
        gaps = f"; gaps of up to {manifest.regions.close_gaps} pixels are closed" if manifest.regions.close_gaps else ""
        yield "regions", f"{known}{least}{gaps}"
    review = raw_review_threshold(manifest.image)
    if review is not None:
        yield "review threshold", f"{review:.4g}; images between the two are to review"
    yield "pixel threshold", _threshold(manifest.pixel)
    if manifest.calibration is None:
        yield "calibration", "none: no p-values, no drift"
    else:
        sessions = manifest.calibration.sessions
        of = "" if sessions is None else f" of {len(set(sessions.scores))} recording sessions"
        yield "calibration", f"{len(manifest.calibration.scores)} normal images{of}"
        yield "promise", describe_promise(manifest.calibration)


def _width_by_height(size: tuple[int, int]) -> str:
    """A height and a width, as a user reads them."""
    return f"{size[1]} x {size[0]}"


def _threshold(scale: Scale) -> str:
    """The threshold that verdicts go by, and what it was made of."""
    from patchcore_plugin.scoring.thresholds import raw_threshold

    threshold = raw_threshold(scale)
    if threshold is None:
        return "none: the model was never validated"
    if scale.minimum is None or scale.maximum is None:
        return f"{threshold:.4g}"
    moved = "" if scale.sensitivity == 0.5 else f", moved from {scale.threshold:.4g} by sensitivity {scale.sensitivity:g}"
    return f"{threshold:.4g}{moved}; scores are normalized by the range {scale.minimum:.4g} to {scale.maximum:.4g}"


@click.command()
@_bundle
@click.option("--images", type=click.Path(path_type=Path), help="Folder of sample images to give a verdict on.")
@device
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def validate(bundle: Path, images: Path | None, device: str, as_json: bool) -> None:
    """Check a BUNDLE before it is used on this machine.

    Checks manifest, checksums, network and memory bank; compares the scores of the self-test with those of the machine
    that wrote the bundle; measures the time of an image; and gives verdicts on sample images. Ends with exit code 1 if a
    check fails.

    A score of the self-test may differ by 0.2 % with a network in f32 (other CPUs round otherwise), and by 5 % in bf16 or
    int8 (CPUs without this arithmetic compute in another, and those with it round it differently).
    """
    from patchcore_plugin.images import find_images
    from patchcore_plugin.operations.validation import validate_bundle

    samples = () if images is None else find_images(images)
    with step_bars() as progress:
        report = validate_bundle(bundle, samples, progress, device)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "ok": report.ok, **asdict(report)}, indent=2))
    else:
        _print_validation(report, images)
        click.echo(f"{bundle} is {'fit for use' if report.ok else 'NOT fit for use'} on this machine.")
    if not report.ok:
        sys.exit(1)


def _print_validation(report: ValidationReport, folder: Path | None) -> None:
    console = Console()
    table = Table("check", "result", "")
    for check in report.checks:
        table.add_row(check.name, {"failed": "[red]failed[/red]"}.get(check.result, check.result), as_cell(check.detail))
    console.print(table)
    if folder and report.images:
        table = Table("image", "score", "threshold", "verdict")
        for row in report.images:
            numbers = ["" if row.get(name) is None else f"{row[name]:.4g}" for name in ("score", "threshold")]
            verdict = str(row.get("error") or row.get("verdict") or "none")
            table.add_row(as_cell(Path(str(row["image"])).relative_to(folder)), *numbers, as_cell(verdict))
        console.print(table)


@click.command()
@_bundle
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for a picture of the crops.",
)
def explain(bundle: Path, image: Path, output: Path | None) -> None:
    """Show why an IMAGE has its verdict.

    Prints the nearest normal patch of each anomalous region, and its distance. A patch is named by its row and column in
    the patch grid, from 0. With --output, IMAGE.explain.png shows the surroundings of each anomalous patch on the left and,
    if the bundle was exported with --thumbnails, those of the normal patch on the right.
    """
    from patchcore_plugin.bundle import check_outside
    from patchcore_plugin.drawings import save_drawing
    from patchcore_plugin.runtime import PatchcoreRuntime
    from patchcore_plugin.runtime.explain import draw

    runtime = PatchcoreRuntime.load(bundle)
    if output is not None:
        check_outside(output, bundle)
    prediction, reasons = runtime.explain(image)
    _print_explanation(image, prediction, reasons)
    if runtime.origins is None:
        click.echo("The bundle does not know which images its vectors come from. A model that is trained again knows.")
    elif runtime.origins.thumbnails is None:
        click.echo("Export the model with --thumbnails to see the normal patches.")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        target = output / f"{image.name}.explain.png"
        save_drawing(draw(reasons), target)
        click.echo(f"Crops: {target}")


def _print_explanation(image: Path, prediction: Prediction, reasons: Sequence[Reason]) -> None:
    threshold = "none" if prediction.threshold is None else f"{prediction.threshold:.4g}"
    verdict = prediction.verdict or "no verdict"
    click.echo(f"{as_line(str(image))}: {verdict}, score {prediction.score:.4g}, threshold {threshold}")
    table = Table("region in the image", "patch", Column("nearest normal patch", overflow="fold"), "there at", "distance")
    for reason in reasons:
        region, nearest = reason.region, reason.nearest
        place = "none: the farthest patch"
        if region is not None:
            place = f"{region.width} x {region.height} at {region.left}, {region.top}"
        normal = f"vector {nearest.vector}"
        if nearest.image is not None:
            normal = f"{nearest.image}, {nearest.row}, {nearest.column}"
        box = "" if nearest.box is None else f"{nearest.box.left}, {nearest.box.top}"
        table.add_row(place, f"{reason.row}, {reason.column}", as_cell(normal), box, f"{nearest.distance:.4g}")
    Console().print(table)


@click.command(epilog="Example: patchcore benchmark bundle /path/to/images")
@_bundle
@_folder
@click.option("--threads", type=click.IntRange(min=1), help="Threads to work with.  [default: all cores]")
@click.option("--limit", type=click.IntRange(min=2), default=200, show_default=True, help="Largest number of images.")
@device
def benchmark(bundle: Path, folder: Path, threads: int | None, limit: int, device: str) -> None:
    """Measure where the time of a BUNDLE goes.

    Scores the images below FOLDER on this machine, and prints the time of each stage and the images per second.
    """
    from patchcore_plugin.images import find_images
    from patchcore_plugin.operations import benchmark as measure
    from patchcore_plugin.runtime import PatchcoreRuntime

    images = find_images(folder)[:limit]
    images *= -(-30 // len(images))  # the median of fewer says little
    runtime = PatchcoreRuntime.load(bundle, threads=threads, device=device)
    manifest = runtime.manifest
    parts = " + ".join(
        f"{member.backbone}, {member.bank_size:,} x {member.embedding_dimension} bank ({member.index.kind}, "
        f"{member.index.storage})"
        for member in manifest.all_members
    )
    click.echo(
        f"{manifest.name}: {parts}; network in {manifest.precision} on {runtime.device}, {runtime.threads} threads, "
        f"{len(images)} images"
    )
    times = measure.stages(runtime, images)
    table = Table("stage", "median ms", "90 % below")
    for stage, spent in {**times, "all": list(map(sum, zip(*times.values(), strict=True)))}.items():
        median, high = (sorted(spent)[int(len(spent) * share)] for share in (0.5, 0.9))
        table.add_row(stage, f"{median:.2f}", f"{high:.2f}")
    Console().print(table)
    for mode in ("latency", "throughput"):
        runtime = PatchcoreRuntime.load(bundle, mode=mode, threads=threads, device=device)
        click.echo(f"{measure.images_per_second(runtime, images):.0f} images/s in mode {mode}")


@click.command(epilog="Example: patchcore pack bundle && bentoml serve patchcore_plugin.bento.service:PatchcoreService")
@_bundle
def pack(bundle: Path) -> None:
    """Put a BUNDLE into BentoML's model store.

    `bentoml serve` and `bentoml build` find it there.
    """
    import bentoml

    from patchcore_plugin.bundle import (
        MANIFEST,
        BundleError,
        copy_files,
        ended_by_signals,
        read_manifest_and_version,
        version_of,
    )

    manifest, version = read_manifest_and_version(bundle)
    labels = {"model": manifest.name, "backbone": manifest.backbones, "format_version": str(manifest.format_version)}
    with ended_by_signals(), bentoml.models.create("patchcore", labels=labels) as stored:
        copy_files(bundle, manifest, stored.path)
        shutil.copyfile(bundle / MANIFEST, Path(stored.path) / MANIFEST)
        if version_of(stored.path) != version:
            msg = f"{bundle} was replaced meanwhile; pack it again."
            raise BundleError(msg)
    click.echo(f"Packed as {stored.tag}. Serve it: bentoml serve patchcore_plugin.bento.service:PatchcoreService")
