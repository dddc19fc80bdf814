"""The command ``patchcore update``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from patchcore_plugin.cli.common import as_cell, progress_bar, step_bars
from patchcore_plugin.errors import UsageError

if TYPE_CHECKING:
    from patchcore_plugin.operations.update import UpdateReport

_TABLE_ROWS_LIMIT = 20


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("new_normals", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle.")
@click.option(
    "--holdout",
    metavar="N",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Hold out every N-th new image, by file name, to measure the update.",
)
@click.option(
    "--test",
    type=click.Path(path_type=Path),
    help="Folder of old test images, good/ and defective/: prints the image AUROC before and after.",
)
def update(bundle: Path, new_normals: Path, output: Path, holdout: int, test: Path | None) -> None:
    """Extend a BUNDLE by new normal images, without training.

    NEW_NORMALS is a folder of normal images that the bundle gives false alarms for. Each of them must be normal: a defect in
    one of them would no longer be found. The bundle stays as it is; a new one is written, which records what it was made
    from. Thresholds that come from normal images are set again; those that come from a validation set with defective images
    stay.
    """
    from patchcore_plugin.bundle import check_outside
    from patchcore_plugin.images import find_images
    from patchcore_plugin.operations.update import update_bundle

    images = find_images(new_normals)
    for folder in (new_normals, test or new_normals):
        check_outside(output, folder)
    labelled = None if test is None else _labelled(test)
    started = time.perf_counter()
    with step_bars() as progress:
        report = update_bundle(bundle, images, output, holdout, progress)
    spent = time.perf_counter() - started
    _print(report)
    if labelled is not None:
        before, after = (_auroc(path, *labelled) for path in (bundle, output))
        click.echo(f"Image AUROC on {test}: {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
    click.echo(f"Updated in {spent:.1f} s. New bundle: {output}")


def _print(report: UpdateReport) -> None:
    step = report.update
    radii = " and ".join(f"{radius:.4g}" for radius in report.radii)
    click.echo(
        f"{step.images} images added {step.vectors:,} vectors to the memory bank, which has {report.bank_size:,} now. Every "
        f"patch of these images lies within {radii} of the bank."
    )
    table = Table("held-out image", "score before", "after", "verdict before", "after")
    order = sorted(range(len(report.names)), key=lambda number: -report.before[number].score)
    for number in order[:_TABLE_ROWS_LIMIT]:
        before, after = report.before[number], report.after[number]
        verdicts = (before.verdict or "none", after.verdict or "none")
        table.add_row(as_cell(Path(report.names[number]).name), f"{before.score:.4g}", f"{after.score:.4g}", *verdicts)
    if len(order) > _TABLE_ROWS_LIMIT:
        table.add_row(f"and {len(order) - _TABLE_ROWS_LIMIT} more", "", "", "", "")
    Console().print(table)
    before, after = report.count("anomalous")
    click.echo(f"False alarms among the {len(report.names)} held-out images: {before} before, {after} after.")
    if report.before[0].review_threshold is not None:
        before, after = report.count("review")
        click.echo(f"To review among them: {before} before, {after} after.")


def _labelled(folder: Path) -> tuple[list[Path], list[bool]]:
    """Test images, and whether each is defective."""
    from patchcore_plugin.images import find_images

    images = find_images(folder)
    kinds = [image.relative_to(folder).parts[0] for image in images]
    if not {"good", "defective"} <= set(kinds):
        msg = f"{folder} must hold the folders good and defective with images; it has {', '.join(sorted(set(kinds)))}."
        raise UsageError(msg)
    chosen = [
        (image, kind == "defective") for image, kind in zip(images, kinds, strict=True) if kind in ("good", "defective")
    ]
    return [image for image, _ in chosen], [defective for _, defective in chosen]


def _auroc(bundle: Path, images: list[Path], defective: list[bool]) -> float:
    from sklearn.metrics import roc_auc_score

    from patchcore_plugin.runtime import PatchcoreRuntime

    runtime = PatchcoreRuntime.load(bundle)
    with progress_bar() as bar:
        scores = [answer.score for answer in bar.track(runtime.stream(images), total=len(images), description="Test")]
    return float(roc_auc_score(defective, scores))
