"""The command ``patchcore check``."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import click

from patchcore_plugin.cli.common import FOUND, step_bars
from patchcore_plugin.errors import UsageError
from patchcore_plugin.names import as_line

REPORT, LIST = "report.html", "leave_out.txt"


@click.command(epilog="Example: patchcore check my_part/good --test my_part/defect -o checked")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--test", type=click.Path(path_type=Path), help="Folder of test images, which must not stand in FOLDER too.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("checked"),
    show_default=True,
    help=f"Folder for {REPORT} and {LIST}.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Config of a training, whose model compares the images: by its backbone, layers, image size and tiles, in its "
    "region of interest. The options below replace its values.",
)
@click.option("--backbone", help="Backbone, as in a config.  [default: efficientnet_lite0]")
@click.option(
    "--layers", multiple=True, help="Layer of the backbone. May be given several times.  [default: blocks.2, blocks.4]"
)
@click.option(
    "--image-size",
    type=(click.IntRange(min=1), click.IntRange(min=1)),
    help="Height and width of the network's input.  [default: 256 256]",
)
@click.option(
    "--region-of-interest",
    metavar="IMAGE|SHAPES",
    help="Where to look: a mask image, white where images are compared, or shapes as in a config, such as "
    "'[{rectangle: [0.7, 0.9, 1, 1], ignore: true}]'.",
)
def check(
    folder: Path,
    test: Path | None,
    output: Path,
    config: Path | None,
    backbone: str | None,
    layers: tuple[str, ...],
    image_size: tuple[int, int] | None,
    region_of_interest: str | None,
) -> None:
    """Check whether all images below FOLDER are good, before a training on them.

    Finds images that look unlike the others, copies (the same file, the same pixels, or the same picture saved anew,
    brighter or smaller), images of the test folder, other sizes or depths than nearly all, and unreadable files. No label
    and no share of defects is needed.

    Writes report.html, with the twenty most suspicious images and what in them is suspicious, and leave_out.txt, the paths
    of suspicious and unreadable images, of all copies but the first, and of images that stand in the test folder. Look at
    the page, take good images out of the list, and train without the others: --model.init_args.exclude
    checked/leave_out.txt

    An image is suspicious if its score lies more than 2 robust standard deviations above the median of all. In folders of
    good images alone, 1 % to 5 % of them do: the list is a proposal.

    With --config my_part.yaml, or with --region-of-interest, what lies outside the region is not looked at.

    The time grows with the square of the number of images, up to 1,000; of more, each is compared with 1,000.

    Exit code: 0 if nothing was found, 3 if something was, 1 after an error, 2 after a wrong option.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # the training stack's remarks about itself
    from patchcore_plugin.images import find_images

    images = find_images(folder)
    tests = [] if test is None else find_images(test)  # before the slow imports
    from patchcore_plugin.cleaning import DEFAULT_ARGUMENTS, check_images, write_list, write_report
    from patchcore_plugin.tuning.config import read_arguments

    given = {
        "backbone": backbone,
        "layers": list(layers),
        "image_size": image_size,
        "region_of_interest": region_of_interest and _read_region(region_of_interest),
    }
    arguments = DEFAULT_ARGUMENTS if config is None else read_arguments(config)
    arguments = arguments | {name: value for name, value in given.items() if value}
    output.mkdir(parents=True, exist_ok=True)
    with step_bars() as progress:
        report = check_images(images, tests, arguments, progress=progress)
    write_report(report, folder, output / REPORT)
    unlisted = write_list(report.leave_out, output / LIST)
    click.echo(f"{len(images)} images, of which {len(report.ranked)} were compared.")
    for kind, count in Counter(finding.kind for finding in report.findings).items():
        click.echo(f"{kind}: {count}")
    if not report.ranked:
        click.echo("Too few images could be compared, so none is called suspicious.")
    for image in unlisted:
        click.echo(f"{as_line(str(image))} cannot stand in the list: its name has a line break. Rename it.", err=True)
    click.echo(f"Report: {output / REPORT}\n{len(report.leave_out)} images to leave out: {output / LIST}")
    if report.findings:
        sys.exit(FOUND)


def _read_region(text: str) -> Any:
    """Shapes in YAML; any other text is the path of a mask image."""
    if not text.lstrip().startswith("["):
        return text
    import yaml  # comes with the training stack

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        msg = f"--region-of-interest {text} cannot be read as YAML: {error}"
        raise UsageError(msg) from error
