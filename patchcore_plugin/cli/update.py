"""The command ``patchcore update``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from patchcore_plugin.cli.common import ManifestChoice, as_cell, progress_bar, step_bars
from patchcore_plugin.errors import UsageError
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from patchcore_plugin.bundle import IndexKind
    from patchcore_plugin.operations.teaching import SaidParts
    from patchcore_plugin.operations.update import UpdateReport
    from patchcore_plugin.runtime import PatchcoreRuntime, Prediction

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
    help="Folder of old test images, good/ and defective/ (or others): prints AUROC, false alarms and missed defects before "
    "and after. With --from, defects by which the AUROC falls are not taught.",
)
@click.option(
    "--index",
    type=ManifestChoice("IndexKind"),
    help="Index of the new memory bank.  [default: as before, or flat where that misses vectors]",
)
def update(
    bundle: Path,
    new_normals: Path | None,
    record: Path | None,
    model: str | None,
    output: Path,
    holdout: int | None,
    test: Path | None,
    index: IndexKind | None,
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
    from patchcore_plugin.runtime import PatchcoreRuntime

    if (new_normals is None) == (record is None):
        msg = "Give either NEW_NORMALS, a folder of normal images, or --from RECORD."
        raise UsageError(msg)
    for folder in filter(None, (new_normals, record, test)):
        check_outside(output, folder)
    labelled = None if test is None else _labelled(test)
    parts, defects = None, None
    if record is None:
        images, holdout = find_images(new_normals), holdout or 5
    else:
        parts, defects = _learn(bundle, record, model, labelled)
        images = [image.path for image in parts.good]
    started = time.perf_counter()
    with step_bars() as progress:
        report = update_bundle(bundle, images, output, holdout, progress, defects, index)
    spent = time.perf_counter() - started
    names = {} if parts is None else {str(image.path): image.name for image in [*parts.good, *parts.bad]}
    _print(report, "held-out" if holdout else "new", names)
    if defects is not None or labelled is not None:
        runtimes = [PatchcoreRuntime.load(path) for path in (bundle, output)]
    if defects is not None:
        _print_bad(runtimes, [image.path for image in parts.bad], names)
    if labelled is not None:
        _print_test(runtimes, test, *labelled)
    click.echo(f"Updated in {spent:.1f} s. New bundle: {output}. To put it in the old one's place, rename both folders.")


def _learn(
    bundle: Path, record: Path, model: str | None, labelled: tuple[list[Path], list[bool]] | None
) -> tuple[SaidParts, NDArray[np.float32] | None]:
    """What operators said, and patches of defects where they do no harm."""
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
        return parts, None
    runtime, bad = PatchcoreRuntime.load(bundle), [image.path for image in parts.bad]
    with step_bars() as progress:
        defects = teaching.find_defect_patches(runtime, bad, progress)
        if labelled is not None:
            scores = teaching.try_defects(runtime, defects, labelled[0], progress)
    if labelled is None:
        click.echo(f"{len(defects)} patches of bad parts are taught. What that changes was not measured: give --test.")
        return parts, defects
    before, after = (float(roc_auc_score(labelled[1], found)) for found in scores)
    change = f"image AUROC {before:.4f} without, {after:.4f} with {len(defects)} patches of bad parts"
    click.echo(f"Tried on {len(labelled[0])} test images: {change}. They are {'NOT ' * (after < before)}taught.")
    return parts, None if after < before else defects


def _print(report: UpdateReport, kind: str, names: Mapping[str, str]) -> None:
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
    for was, now in report.indexes:
        if was.kind != now.kind:
            off = [trial.error for trial in now.trials if trial.index == was.kind]
            found = f", and it was off by {min(off):.2%}" if off else ""
            click.echo(
                f"Index of the memory bank: {was.kind} before, {now.kind} now, which is slower. With {was.kind}, scores of "
                f"these images must be those of exact search within 0.1 %{found}. --index {was.kind} takes it all the same."
            )
    _print_answers(f"{kind} image", report.names, report.before, report.after, names)
    before, after = report.count("anomalous")
    known = "" if kind == "held-out" else " (whose patches are in the bank now)"
    click.echo(f"False alarms among the {len(report.names)} {kind} images{known}: {before} before, {after} after.")
    if report.before[0].review_threshold is not None:
        before, after = report.count("review")
        click.echo(f"To review among them: {before} before, {after} after.")


def _print_answers(
    head: str, paths: list[str], before: list[Prediction], after: list[Prediction], names: Mapping[str, str]
) -> None:
    """Print scores and verdicts, the largest score first."""
    table = Table(head, "score before", "after", "verdict before", "after")
    order = sorted(range(len(paths)), key=lambda number: -before[number].score)
    for number in order[:_TABLE_ROWS_LIMIT]:
        was, now = before[number], after[number]
        name = names.get(paths[number], Path(paths[number]).name)
        table.add_row(as_cell(name), f"{was.score:.4g}", f"{now.score:.4g}", was.verdict or "none", now.verdict or "none")
    if len(order) > _TABLE_ROWS_LIMIT:
        table.add_row(f"and {len(order) - _TABLE_ROWS_LIMIT} more", "", "", "", "")
    Console().print(table)


def _print_bad(runtimes: list[PatchcoreRuntime], images: list[Path], names: Mapping[str, str]) -> None:
    """Print what became of the parts that operators called bad."""
    before, after = (runtime.predict(images) for runtime in runtimes)
    _print_answers("bad part", list(map(str, images)), before, after, names)
    normal = [sum(answer.verdict == "normal" for answer in answers) for answers in (before, after)]
    click.echo(f"Of {len(images)} bad parts, {normal[0]} were called normal before, and {normal[1]} are now.")


def _labelled(folder: Path) -> tuple[list[Path], list[bool]]:
    """Test images, and whether each is defective."""
    from patchcore_plugin.images import find_images

    images = find_images(folder)
    defective = [image.relative_to(folder).parts[0] != "good" for image in images]
    if all(defective) or not any(defective):
        found = ", ".join(sorted({image.relative_to(folder).parts[0] for image in images}))
        msg = f"{folder} must hold the folder good, and others with defective images, such as defective; it has {found}."
        raise UsageError(msg)
    return images, defective


def _print_test(runtimes: list[PatchcoreRuntime], test: Path, images: list[Path], defective: list[bool]) -> None:
    """Print what the update changes on test images."""
    from sklearn.metrics import roc_auc_score

    areas, alarms, missed = [], [], []
    for runtime in runtimes:
        with progress_bar() as bar:
            answers = list(bar.track(runtime.stream(images), total=len(images), description="Test"))
        areas.append(float(roc_auc_score(defective, [answer.score for answer in answers])))
        verdicts = [answer.verdict for answer in answers]
        alarms.append(sum(one == "anomalous" and not bad for one, bad in zip(verdicts, defective, strict=True)))
        missed.append(sum(one == "normal" and bad for one, bad in zip(verdicts, defective, strict=True)))
    good, bad = len(images) - sum(defective), sum(defective)
    click.echo(f"Image AUROC on {test}: {areas[0]:.4f} before, {areas[1]:.4f} after ({areas[1] - areas[0]:+.4f})")
    click.echo(
        f"Of its {good} good images, {alarms[0]} were anomalous before, and {alarms[1]} are now; of its {bad} defective "
        f"ones, {missed[0]} were normal, and {missed[1]} are now."
    )
