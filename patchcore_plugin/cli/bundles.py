"""Commands about a bundle: ``patchcore validate``, ``patchcore info`` and ``patchcore explain``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from patchcore_plugin.cli.common import plain_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from patchcore_plugin.bundle import Manifest, Scale


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", type=click.Path(path_type=Path), help="Folder of sample images to give a verdict on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@plain_errors
def validate(bundle: Path, images: Path | None, as_json: bool) -> None:
    """Check a BUNDLE before it is put to use on this machine.

    Looks at manifest, checksums, network and bank; compares the scores of its self-test with those of the machine that wrote
    it; measures the time of an image; and gives verdicts on sample images. Ends with exit code 1 if anything failed.

    A self-test's score may differ by 0.2 % with a network in f32 (other CPUs round otherwise), and by 5 % in bf16 or int8
    (not every CPU has their arithmetic, and those that do round it differently).
    """
    from patchcore_plugin.images import find_images
    from patchcore_plugin.operations.validation import validate_bundle

    samples = () if images is None else find_images(images)
    with Console(stderr=True).status("Validate") as status:
        report = validate_bundle(bundle, samples, lambda step: status.update(f"Validate: {step}"))
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "ok": report.ok, **asdict(report)}, indent=2))
    else:
        table = Table("check", "result", "")
        for check in report.checks:
            table.add_row(check.name, {"failed": "[red]failed[/red]"}.get(check.result, check.result), check.detail)
        console = Console()
        console.print(table)
        if images and report.images:
            table = Table("image", "score", "threshold", "verdict")
            for row in report.images:
                number = [f"{row[name]:.4g}" if row.get(name) is not None else "" for name in ("score", "threshold")]
                table.add_row(
                    str(Path(str(row["image"])).relative_to(images)),
                    *number,
                    str(row.get("error") or row.get("verdict") or "none"),
                )
            console.print(table)
        click.echo(f"{bundle} is {'fit for use' if report.ok else 'NOT fit for use'} on this machine.")
    if not report.ok:
        sys.exit(1)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@plain_errors
def info(bundle: Path) -> None:
    """Say what a BUNDLE is: model, memory bank, thresholds, where it comes from. Its manifest.json has every detail."""
    from patchcore_plugin.bundle import read_manifest, version_of

    manifest = read_manifest(bundle)
    table = Table(show_header=False)
    for name, text in _summary(manifest, version_of(bundle)):
        table.add_row(name, text)
    Console().print(table)


def _summary(manifest: Manifest, version: str) -> Iterator[tuple[str, str]]:
    from patchcore_plugin.bundle import ORIGINS, THUMBNAILS

    recipe, index = manifest.preprocessing, manifest.index
    yield "name", manifest.name
    yield "version", f"{version} (format {manifest.format_version})"
    yield "created", f"{manifest.created:%Y-%m-%d %H:%M %Z}"
    yield "backbone", f"{manifest.backbone}, layers {', '.join(manifest.layers)}, in {manifest.precision}"
    for trial in manifest.precision_trials:
        yield "", f"{trial.precision}: {trial.milliseconds:.2f} ms, mean error of scores {trial.error:.2%} when exported"
    crop = "" if recipe.crop is None else f", of which the middle {recipe.crop[1]} x {recipe.crop[0]}"
    yield "input", f"resized to {recipe.resize[1]} x {recipe.resize[0]} pixels{crop}; {_times(manifest.grid)} patches"
    radius = "unknown" if manifest.covering_radius is None else f"{manifest.covering_radius:.4g}"
    yield "memory bank", f"{manifest.bank_size:,} x {manifest.embedding_dimension}, covering radius {radius}"
    yield "index", f"{index.kind} in {index.storage}" + (f", width {index.width}" if index.width else "")
    for trial in index.trials:
        if (trial.index, trial.width) == (index.kind, index.width):
            found = f"recall@1 {trial.recall:.4f}, error {trial.error:.1e} at the 99.9th percentile"
            yield "", f"{trial.milliseconds:.2f} ms an image, {found} when exported"
    smoothed = f", smoothed by {manifest.score_smoothing:g} patches" if manifest.score_smoothing else ""
    weighted = f", re-weighted by {manifest.num_neighbors} neighbours" if manifest.num_neighbors > 1 else ""
    yield "image score", f"largest patch distance{smoothed}{weighted}"
    yield "image threshold", _scale(manifest.image)
    yield "pixel threshold", _scale(manifest.pixel)
    if manifest.calibration is None:
        yield "calibration", "none: no p-values, no drift"
    else:
        count, rate = len(manifest.calibration.scores), manifest.calibration.false_positive_rate
        yield "calibration", f"{count} normal images, for {rate:.2%} of false alarms at most"
    known = "image, row and column of each bank vector" if ORIGINS in manifest.files else "unknown"
    yield "origins", known + (", with thumbnails" if THUMBNAILS in manifest.files else "")
    yield "self-test", "none" if manifest.self_test is None else f"{len(manifest.self_test.scores)} scores"
    for update in manifest.lineage:
        yield "update", f"{update.date:%Y-%m-%d}: {update.images} images added {update.vectors} vectors to {update.parent}"
    for name, file in manifest.files.items():
        yield name, f"{file.bytes / 2**20:.2f} MiB"
    yield "written with", ", ".join(f"{package} {number}" for package, number in manifest.versions.items())


def _times(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _scale(scale: Scale) -> str:
    if scale.threshold is None:
        return "none: the model was never validated"
    seen = "" if scale.minimum is None else f", scores seen {scale.minimum:.4g} to {scale.maximum:.4g}"
    return f"{scale.threshold:.4g}{seen}, sensitivity {scale.sensitivity:g}"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for a picture of the crops.",
)
@plain_errors
def explain(bundle: Path, image: Path, output: Path | None) -> None:
    """Say why an IMAGE has its verdict: the nearest normal patch of each anomalous region, and its distance.

    A patch is named by row and column in the patch grid, from 0. With --output, IMAGE.explain.png shows what is around each
    anomalous patch on the left and, where the bundle was exported with --thumbnails, around the normal one on the right.
    """
    from patchcore_plugin.runtime import PatchcoreRuntime
    from patchcore_plugin.runtime.explain import draw

    runtime = PatchcoreRuntime.load(bundle)
    prediction, reasons = runtime.explain(image)
    threshold = "none" if prediction.threshold is None else f"{prediction.threshold:.4g}"
    click.echo(f"{image}: {prediction.verdict or 'no verdict'}, score {prediction.score:.4g}, threshold {threshold}")
    table = Table("region in the image", "patch", "nearest normal patch", "there at", "distance")
    for reason in reasons:
        region, nearest = reason.region, reason.nearest
        where = "none: the farthest patch"
        if region is not None:
            where = f"{region.width} x {region.height} at {region.left}, {region.top}"
        of = f"vector {nearest.vector}" if nearest.image is None else f"{nearest.image}, {nearest.row}, {nearest.column}"
        box = "" if nearest.box is None else f"{nearest.box.left}, {nearest.box.top}"
        table.add_row(where, f"{reason.row}, {reason.column}", of, box, f"{nearest.distance:.4g}")
    Console().print(table)
    if runtime.origins is None:
        click.echo("The bundle does not say where its vectors come from. Train and export the model again to know.")
    elif runtime.origins.thumbnails is None:
        click.echo("The normal patches can be shown where the bundle was exported with --thumbnails.")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        target = output / f"{image.name}.explain.png"
        draw(reasons).save(target)
        click.echo(f"Crops: {target}")
