"""The command ``patchcore update``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from patchcore_plugin.cli.common import plain_errors, progress_bar

if TYPE_CHECKING:
    from patchcore_plugin.operations.update import Report

_SHOWN = 20  # held-out images in the table


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("new_normals", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle.")
@click.option(
    "--holdout",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Every so many-th new image, by name, stays out of the bank and judges the update.",
)
@click.option(
    "--test",
    type=click.Path(path_type=Path),
    help="Folder of old test images, good/ and defective/: prints the image AUROC before and after.",
)
@plain_errors
def update(bundle: Path, new_normals: Path, output: Path, holdout: int, test: Path | None) -> None:
    """Extend a BUNDLE by NEW_NORMALS, a folder of normal images that it gives false alarms for.

    Needs no training. The bundle stays as it is; a new one is written, which knows what it was made from. Every image of the
    folder must be normal: a defect among them would no longer be found. Thresholds that were calibrated by normal images
    are set again; those that validation set with defective ones stay.
    """
    from patchcore_plugin.images import find_images
    from patchcore_plugin.operations.update import update_bundle

    images = find_images(new_normals)
    labelled = None if test is None else _labelled(test)
    started = time.perf_counter()
    with progress_bar() as bar:
        tasks: dict[str, object] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step)
            bar.update(tasks[step], completed=done, total=total)

        report = update_bundle(bundle, images, output, holdout, progress)
    spent = time.perf_counter() - started
    _print(report)
    if labelled is not None:
        before, after = (_auroc(path, *labelled) for path in (bundle, output))
        click.echo(f"Image AUROC on {test}: {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
    click.echo(f"Updated in {spent:.1f} s. New bundle: {output}")


def _print(report: Report) -> None:
    step = report.update
    click.echo(
        f"{step.vectors:,} vectors of {step.images} images went into the bank, which has {report.bank_size:,} now; every "
        f"patch of them lies within {report.radius:.4g}."
    )
    table = Table("held-out image", "score before", "after", "verdict before", "after")
    order = sorted(range(len(report.names)), key=lambda number: -report.before[number].score)
    for number in order[:_SHOWN]:
        before, after = report.before[number], report.after[number]
        verdicts = (before.verdict or "none", after.verdict or "none")
        table.add_row(Path(report.names[number]).name, f"{before.score:.4g}", f"{after.score:.4g}", *verdicts)
    if len(order) > _SHOWN:
        table.add_row(f"and {len(order) - _SHOWN} more", "", "", "", "")
    Console().print(table)
    before, after = report.false_alarms
    click.echo(f"False alarms among the {len(report.names)} held-out images: {before} before, {after} after.")


def _labelled(folder: Path) -> tuple[list[Path], list[bool]]:
    """Test images, and whether each is defective."""
    from patchcore_plugin.images import find_images

    images = find_images(folder)
    kinds = [image.relative_to(folder).parts[0] for image in images]
    if not {"good", "defective"} <= set(kinds):
        msg = f"{folder} must hold the folders good and defective with images; it has {', '.join(sorted(set(kinds)))}."
        raise ValueError(msg)
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
