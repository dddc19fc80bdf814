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
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from patchcore_plugin.operations.update import UpdateReport

_TABLE_ROWS_LIMIT = 20


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("new_normals", type=click.Path(path_type=Path), required=False)
@click.option(
    "--from",
    "record",
    metavar="RECORD",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Learn from what operators said on the service's page, instead of NEW_NORMALS: folder of its record "
    "(PATCHCORE_RECORD).",
)
@click.option("--model", help="With --from: name of the model in the service, where the record has answers of several.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder of the new bundle.")
@click.option(
    "--holdout",
    metavar="N",
    type=click.IntRange(min=2),
    help="Hold out every N-th new image, by file name, to measure the update.  [default: 5; with --from none, as false "
    "alarms are no fair sample to set thresholds by]",
)
@click.option(
    "--test",
    type=click.Path(path_type=Path),
    help="Folder of old test images, good/ and defective/: prints the image AUROC before and after. With --from, defects "
    "by which it falls are not taught.",
)
def update(
    bundle: Path,
    new_normals: Path | None,
    record: Path | None,
    model: str | None,
    output: Path,
    holdout: int | None,
    test: Path | None,
) -> None:
    """Extend a BUNDLE by new normal images, or by what operators said, without training.

    NEW_NORMALS is a folder of normal images that the bundle gives false alarms for. Each of them must be normal: a defect in
    one of them would no longer be found. The bundle stays as it is; a new one is written, which records what it was made
    from. Thresholds that come from normal images are set again; those that come from a validation set with defective images
    stay.

    With --from, parts that an operator called good are learned as normal, and of each part called bad, up to five patches of
    its worst region become known defects: what resembles them more than anything normal gets a higher score, and nothing
    gets a lower one.
    """
    from patchcore_plugin.bundle import check_outside
    from patchcore_plugin.images import find_images
    from patchcore_plugin.operations.update import update_bundle

    if (new_normals is None) == (record is None):
        msg = "Give either NEW_NORMALS, a folder of normal images, or --from RECORD."
        raise UsageError(msg)
    for folder in filter(None, (new_normals, record, test)):
        check_outside(output, folder)
    labelled = None if test is None else _labelled(test)
    defects = None
    if record is None:
        images, holdout = find_images(new_normals), holdout or 5
    else:
        images, defects = _learn(bundle, record, model, labelled)
    started = time.perf_counter()
    with step_bars() as progress:
        report = update_bundle(bundle, images, output, holdout, progress, defects)
    spent = time.perf_counter() - started
    _print(report, "held-out" if holdout else "new")
    if labelled is not None:
        before, after = (_auroc(path, *labelled) for path in (bundle, output))
        click.echo(f"Image AUROC on {test}: {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
    click.echo(f"Updated in {spent:.1f} s. New bundle: {output}")


def _learn(
    bundle: Path, record: Path, model: str | None, labelled: tuple[list[Path], list[bool]] | None
) -> tuple[list[Path], NDArray[np.float32] | None]:
    """Images of good parts, and patches of defects where they do no harm."""
    from sklearn.metrics import roc_auc_score

    from patchcore_plugin.operations import teaching
    from patchcore_plugin.runtime import PatchcoreRuntime

    parts = teaching.read_parts(record, model)
    click.echo(f"Operators called {len(parts.good)} parts good and {len(parts.bad)} bad.")
    for reason, names in {
        "was called both good and bad, and teaches nothing": parts.contradicted,
        "is not stored in the record, or damaged, and teaches nothing": parts.missing,
    }.items():
        for name in names:
            click.echo(f"{as_line(name)} {reason}.")
    if not parts.bad:
        return parts.good, None
    runtime = PatchcoreRuntime.load(bundle)
    with step_bars() as progress:
        defects = teaching.find_defect_patches(runtime, parts.bad, progress)
        if labelled is not None:
            scores = teaching.try_defects(runtime, defects, labelled[0], progress)
    if labelled is None:
        click.echo(f"{len(defects)} patches of bad parts are taught. What that changes was not measured: give --test.")
        return parts.good, defects
    before, after = (float(roc_auc_score(labelled[1], found)) for found in scores)
    change = f"image AUROC {before:.4f} without, {after:.4f} with {len(defects)} patches of bad parts"
    click.echo(f"{change}: they are {'NOT ' * (after < before)}taught.")
    return parts.good, None if after < before else defects


def _print(report: UpdateReport, kind: str) -> None:
    step = report.update
    if step.defects is not None:
        click.echo(f"{step.defects} patches of bad parts became known defects.")
    if not step.images:
        return
    radii = " and ".join(f"{radius:.4g}" for radius in report.radii)
    click.echo(
        f"{step.images} images added {step.vectors:,} vectors to the memory bank, which has {report.bank_size:,} now. Every "
        f"patch of these images lies within {radii} of the bank."
    )
    table = Table(f"{kind} image", "score before", "after", "verdict before", "after")
    order = sorted(range(len(report.names)), key=lambda number: -report.before[number].score)
    for number in order[:_TABLE_ROWS_LIMIT]:
        before, after = report.before[number], report.after[number]
        verdicts = (before.verdict or "none", after.verdict or "none")
        table.add_row(as_cell(Path(report.names[number]).name), f"{before.score:.4g}", f"{after.score:.4g}", *verdicts)
    if len(order) > _TABLE_ROWS_LIMIT:
        table.add_row(f"and {len(order) - _TABLE_ROWS_LIMIT} more", "", "", "", "")
    Console().print(table)
    before, after = report.count("anomalous")
    click.echo(f"False alarms among the {len(report.names)} {kind} images: {before} before, {after} after.")
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
