"""Commands that need torch: ``patchcore train``, ``fit``, ``test``, ``export`` and ``demo``."""

from __future__ import annotations

import logging
import traceback
import warnings
from pathlib import Path
from typing import Any

import click

from patchcore_plugin.cli.common import ManifestChoice, print_trials, step_bars
from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.names import as_line

_HELP = """{summary}

Arguments are those of `anomalib {name}`, whose own help follows; short model names of plugins work too.

\b
  patchcore {name} --config configs/folder.yaml \\
    --data.init_args.name my_part --data.init_args.root /path/to/my_part \\
    --model.init_args.coreset_sampling_ratio 0.05

--print_config behind them prints all arguments with their values, those of the model below model.init_args. What each is
for: python -c "help(__import__('patchcore_plugin').FaissPatchcore)"
"""


def _anomalib_command(name: str, summary: str) -> click.Command:
    """The command of anomalib's that has this name."""

    @click.command(
        name,
        short_help=summary,
        help=_HELP.format(summary=summary, name=name),
        add_help_option=False,  # anomalib's help follows ours
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def command(context: click.Context, arguments: tuple[str, ...]) -> None:
        if {"-h", "--help"} & set(arguments):
            click.echo(f"{context.get_help()}\n", color=context.color)
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from patchcore_plugin.registry import run_anomalib

        warnings.filterwarnings("ignore", category=FutureWarning)  # the training stack's remarks about itself
        logging.getLogger("patchcore_plugin").setLevel(logging.INFO)  # radius of the bank, images left out, checkpoint
        try:
            run_anomalib([name, *arguments])
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            if isinstance(error, PatchcoreError) or _is_raised_by_the_model(error):
                raise
            # anomalib's and Lightning's way to say that an argument or a data set does not fit
            raise UsageError(str(error)) from error

    return command


@click.command("anomalib", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def anomalib_command(arguments: tuple[str, ...]) -> None:
    """Run any command of anomalib's with plugins' models.

    Such as `patchcore anomalib benchmark --config FILE`: anomalib's own command line takes a plugin's model by its
    class_path to train, and refuses it in a benchmark.
    """
    from patchcore_plugin.registry import run_anomalib

    run_anomalib(list(arguments))


def _is_raised_by_the_model(error: Exception) -> bool:
    """Whether an error came out of this package's model or sampler, rather than out of anomalib around them."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.startswith(("patchcore_plugin.model", "patchcore_plugin.coreset")) for module in modules)


train = _anomalib_command("train", "Fit a model, then test it, with anomalib.")
fit = _anomalib_command("fit", "Fit a model with anomalib.")
test = _anomalib_command("test", "Test a model with anomalib.")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the model in the bundle.  [default: the bundle folder's name]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is already there.")
@click.option(
    "--index",
    type=ManifestChoice("IndexKind", "auto"),
    default="auto",
    show_default=True,
    help="Index of the memory bank. auto takes the fastest on this machine whose scores and maps are near those of exact "
    "search.",
)
@click.option(
    "--storage",
    type=ManifestChoice("Storage"),
    default="float32",
    show_default=True,
    help="Number format of the memory bank's vectors.",
)
@click.option(
    "--precision",
    type=ManifestChoice("Precision", "auto"),
    default="f32",
    show_default=True,
    help="Arithmetic of the network. auto takes the fastest on this machine whose scores are near those of f32.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder of normal images that were not trained on, to measure on.  [default: some of the validation set]",
)
@click.option(
    "--thumbnails",
    is_flag=True,
    help="Put small pictures of the training images into the bundle, to show beside an anomaly. Each takes up to 192 KiB "
    "in the bundle and in memory.",
)
@click.option(
    "--min-area",
    type=float,
    default=0.0,
    help="Least area of a region that is listed: in pixels of the image, or in mm² with --mm-per-pixel. Smaller ones are "
    "counted. Scores and verdicts stay.",
)
@click.option("--mm-per-pixel", type=float, help="Side of a pixel of the images, in mm: tells regions in mm too.")
@click.option("--close-gaps", type=int, default=0, help="Pixels between two parts up to which they are one region.")
def export(checkpoint: Path, bundle: Path, images: Path | None, **options: Any) -> None:
    """Write a trained model as a bundle.

    CHECKPOINT is the .ckpt file that training wrote (results/FaissPatchcore/.../weights/lightning/model.ckpt). BUNDLE is
    the folder to write.
    """
    from patchcore_plugin.bundle import read_manifest
    from patchcore_plugin.export import export_bundle
    from patchcore_plugin.images import find_images
    from patchcore_plugin.model.lightning_model import FaissPatchcore

    _check_checkpoint(checkpoint)
    normal = None if images is None else find_images(images)
    model = FaissPatchcore.load_from_checkpoint(checkpoint, map_location="cpu")
    with step_bars() as progress:
        export_bundle(model, bundle, images=normal, progress=progress, **options)
    print_trials(read_manifest(bundle))
    click.echo(f"Bundle: {bundle}")


def _check_checkpoint(checkpoint: Path) -> None:
    """Refuse a path that is no file. A training that failed takes the link ``latest`` along, and leaves no checkpoint."""
    if checkpoint.is_file():
        return
    msg = f"There is no file {as_line(str(checkpoint))}."
    if checkpoint.is_dir():
        msg = f"{as_line(str(checkpoint))} is a folder: give the .ckpt file of a training."
        if found := list(checkpoint.rglob("*.ckpt")):
            newest = max(found, key=lambda other: other.stat().st_mtime)
            msg = f"{msg} The newest one in it is {as_line(str(newest))}."
    if "latest" in checkpoint.parts:
        place = checkpoint.parts.index("latest")
        trainings, rest = Path(*checkpoint.parts[:place]), checkpoint.parts[place + 1 :]
        others = [other for other in trainings.glob(str(Path("v*", *rest))) if other.is_file()]
        if others:
            newest = max(others, key=lambda other: other.stat().st_mtime)
            msg = f"{msg} The latest training has written none; the newest that has is {as_line(str(newest))}."
    raise UsageError(msg)


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("patchcore-demo"),
    show_default=True,
    help="Folder for everything that the demo writes.",
)
@click.option("--data-only", is_flag=True, help="Only write the images into datasets/elpv, for configs/elpv.yaml.")
def demo(folder: Path, data_only: bool) -> None:
    """Train, export and serve on real solar-cell images.

    The service is asked about some of the images, and a figure shows its answers. Needs no network; takes a few minutes on
    two cores. Safe to run again: it trains anew and replaces its own results.
    """
    if data_only:
        from patchcore_plugin.elpv import lay_out

        root = Path("datasets", "elpv")
        for name, count in lay_out(root).items():
            click.echo(f"{count:4d} images in {root / name}")
    else:
        from patchcore_plugin import demo as steps

        steps.run(folder)
