"""The console command ``patchcore``."""

from __future__ import annotations

import csv
import logging
import sys
from pathlib import Path
from pickle import UnpicklingError  # the exception alone
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from patchcore_plugin import __version__
from patchcore_plugin.cli.bundles import explain, info, validate
from patchcore_plugin.cli.common import plain_errors, progress_bar
from patchcore_plugin.cli.evaluate import evaluate
from patchcore_plugin.cli.update import update

if TYPE_CHECKING:
    from patchcore_plugin.bundle import Manifest

_ANOMALIB_COMMANDS = {
    "train": "Fit a model, then test it, with anomalib.",
    "fit": "Fit a model with anomalib.",
    "test": "Test a model with anomalib.",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="patchcore")
def main() -> None:
    """PatchCore: train with anomalib, export one folder (a bundle), serve it on a CPU without torch."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])


def _add_anomalib_command(name: str, summary: str) -> None:
    @main.command(
        name,
        short_help=summary,
        help=f"{summary} Arguments are anomalib's own; short model names of plugins work too.",
        add_help_option=False,  # anomalib's help lists the arguments
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @plain_errors
    def command(arguments: tuple[str, ...]) -> None:
        from patchcore_plugin.registry import run_anomalib

        run_anomalib([name, *arguments])


for _name, _summary in _ANOMALIB_COMMANDS.items():
    _add_anomalib_command(_name, _summary)


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the model in the manifest.  [default: the bundle folder's name]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@click.option(
    "--index",
    type=click.Choice(["auto", "flat", "bfloat16", "ivf", "hnsw"]),
    default="auto",
    show_default=True,
    help="Index of the memory bank. auto takes the fastest on this machine that finds what exact search finds.",
)
@click.option(
    "--storage",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Precision of the bank's vectors.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "f32", "bf16", "int8"]),
    default="f32",
    show_default=True,
    help="Arithmetic of the network. auto takes the fastest whose scores are near f32's.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder of normal images that were not trained on, to measure on.  [default: some of the validation set]",
)
@click.option(
    "--thumbnails",
    is_flag=True,
    help="Put small pictures of the training images into the bundle, to show beside an anomaly: 192 KiB an image, at most, "
    "in the bundle and in memory.",
)
@plain_errors
def export(checkpoint: Path, bundle: Path, images: Path | None, **options: Any) -> None:
    """Write a trained model as a bundle.

    CHECKPOINT is the .ckpt file that training left (results/FaissPatchcore/.../weights/lightning/model.ckpt); BUNDLE the
    folder to write.
    """
    from patchcore_plugin.bundle import read_manifest
    from patchcore_plugin.export import export_bundle
    from patchcore_plugin.images import find_images
    from patchcore_plugin.model.lightning_model import FaissPatchcore

    normal = None if images is None else find_images(images)
    try:
        model = FaissPatchcore.load_from_checkpoint(checkpoint, map_location="cpu")
    except (KeyError, UnpicklingError, EOFError, RuntimeError, TypeError) as error:
        msg = f"{checkpoint} is not a checkpoint of FaissPatchcore: {error}"
        raise click.ClickException(msg) from error
    with Console(stderr=True).status("Export") as status:
        export_bundle(model, bundle, images=normal, progress=lambda step: status.update(f"Export: {step}"), **options)
    _print_trials(read_manifest(bundle))
    click.echo(f"Bundle: {bundle}")


def _print_trials(manifest: Manifest) -> None:
    """Print what was measured when a bundle was written."""
    index = manifest.index
    if index.trials:
        table = Table("index", "storage", "width", "ms an image", "recall@1", "error at 99.9 %", "of storage", "")
        for trial in index.trials:
            taken = (trial.index, trial.width) == (index.kind, index.width)
            table.add_row(
                trial.index, trial.storage, str(trial.width or ""), f"{trial.milliseconds:.2f}", f"{trial.recall:.4f}",
                f"{trial.error:.1e}", f"{trial.storage_error:.1e}", "taken" if taken else "" if trial.good else "too far",
            )  # fmt: skip
        Console().print(table)
    if manifest.precision_trials:
        table = Table("precision", "ms an image", "rank correlation", "mean error", "")
        for trial in manifest.precision_trials:
            taken = trial.precision == manifest.precision
            table.add_row(
                trial.precision, f"{trial.milliseconds:.2f}", f"{trial.correlation:.4f}", f"{trial.error:.2%}",
                "taken" if taken else "" if trial.good else "too far from f32",
            )  # fmt: skip
        Console().print(table)


@main.command()
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
@plain_errors
def predict(bundle: Path, folder: Path, output: Path, heatmaps: bool) -> None:
    """Score every image below FOLDER with a BUNDLE.

    Writes results.csv (one row per image) and heatmaps/*.png, named as the images with .png added. An image that cannot be
    read has its reason in the column error; the others go on, and the command ends with exit code 1.
    """
    from patchcore_plugin.images import ImageError, find_images, read_image
    from patchcore_plugin.runtime import PatchcoreRuntime

    runtime = PatchcoreRuntime.load(bundle)
    images = [path for path in find_images(folder) if output.resolve() not in path.resolve().parents]
    output.mkdir(parents=True, exist_ok=True)
    columns = ["image", "score", "normalized_score", "p_value", "verdict", "threshold", "error"]
    failed = anomalous = 0
    with (output / "results.csv").open("w", newline="", encoding="utf-8") as file, progress_bar() as bar:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for path in bar.track(images, description="Predict"):
            relative = path.relative_to(folder)
            row: dict[str, Any] = {"image": relative.as_posix()}
            try:
                pixels = read_image(path)
            except (ImageError, OSError) as error:
                failed += 1
                table.writerow({**row, "error": str(error)})
                continue
            answer = runtime.predict([pixels])[0]
            anomalous += answer.verdict == "anomalous"
            table.writerow({**row, **{name: getattr(answer, name) for name in columns[1:-1]}})
            if heatmaps:
                target = output / "heatmaps" / relative.with_name(f"{relative.name}.png")
                target.parent.mkdir(parents=True, exist_ok=True)
                runtime.heatmap(pixels, answer).save(target)
    click.echo(f"{len(images)} images: {anomalous} anomalous, {failed} unreadable. Results: {output / 'results.csv'}")
    if failed:
        sys.exit(1)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(min=1), help="Threads to work with.  [default: all cores]")
@click.option("--limit", type=click.IntRange(min=2), default=200, show_default=True, help="Images to measure, at most.")
@plain_errors
def benchmark(bundle: Path, folder: Path, threads: int | None, limit: int) -> None:
    """Measure where a BUNDLE's time goes on this machine, with the images below FOLDER."""
    from patchcore_plugin.images import find_images
    from patchcore_plugin.operations import benchmark as measure
    from patchcore_plugin.runtime import PatchcoreRuntime

    images = find_images(folder)[:limit]
    images *= -(-30 // len(images))  # a median of fewer says little
    runtime = PatchcoreRuntime.load(bundle, threads=threads)
    manifest = runtime.manifest
    click.echo(
        f"{manifest.name}: {manifest.backbone} in {manifest.precision}, {manifest.bank_size:,} x "
        f"{manifest.embedding_dimension} bank ({manifest.index.kind}, {manifest.index.storage}); {runtime.threads} threads, "
        f"{len(images)} images"
    )
    times = measure.stages(runtime, images)
    table = Table("stage", "median ms", "90 % below")
    for stage, spent in times.items():
        median, high = (sorted(spent)[int(len(spent) * share)] for share in (0.5, 0.9))
        table.add_row(stage, f"{median:.2f}", f"{high:.2f}")
    whole = sorted(map(sum, zip(*times.values(), strict=True)))
    table.add_row("all", f"{whole[len(whole) // 2]:.2f}", f"{whole[int(len(whole) * 0.9)]:.2f}")
    Console().print(table)
    for mode in ("latency", "throughput"):
        runtime = PatchcoreRuntime.load(bundle, mode=mode, threads=threads)
        click.echo(f"{measure.images_per_second(runtime, images):.0f} images/s in mode {mode}")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@plain_errors
def pack(bundle: Path) -> None:
    """Put a BUNDLE into BentoML's model store, where `bentoml serve` and `bentoml build` find it."""
    import shutil

    import bentoml

    from patchcore_plugin.bundle import MANIFEST, read_manifest, verify

    manifest = read_manifest(bundle)
    verify(bundle, manifest)
    labels = {"model": manifest.name, "backbone": manifest.backbone, "format_version": str(manifest.format_version)}
    with bentoml.models.create("patchcore", labels=labels) as stored:
        for file in (MANIFEST, *manifest.files):
            shutil.copyfile(bundle / file, Path(stored.path) / file)
    click.echo(f"Packed as {stored.tag}. Serve it: bentoml serve patchcore_plugin.bento.service:PatchcoreService")


@main.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("patchcore-demo"),
    show_default=True,
    help="Folder for everything that the demo writes.",
)
@click.option("--data-only", is_flag=True, help="Only lay the images out, below datasets/elpv, for configs/elpv.yaml.")
@plain_errors
def demo(folder: Path, data_only: bool) -> None:
    """Train, export and serve on real solar-cell images, and ask the service about two of them.

    Needs no network; takes a few minutes on two cores. Safe to run again: it trains anew and replaces its own results.
    """
    from patchcore_plugin import demo as steps

    if data_only:
        from patchcore_plugin.elpv import lay_out

        root = Path("datasets", "elpv")
        for name, count in lay_out(root).items():
            click.echo(f"{count:4d} images in {root / name}")
    else:
        steps.run(folder)


main.add_command(evaluate)
main.add_command(explain)
main.add_command(info)
main.add_command(update)
main.add_command(validate)
