"""The console command ``patchcore``: its commands, in the order in which a model meets them."""

from __future__ import annotations

import logging
import sys

import click
from rich.console import Console
from rich.logging import RichHandler

from patchcore_plugin import __version__
from patchcore_plugin.cli import bundles, training
from patchcore_plugin.cli.check import check
from patchcore_plugin.cli.common import PlainGroup
from patchcore_plugin.cli.doctor import doctor
from patchcore_plugin.cli.evaluate import evaluate
from patchcore_plugin.cli.predict import predict
from patchcore_plugin.cli.tune import tune
from patchcore_plugin.cli.update import update
from patchcore_plugin.cli.watch import watch


@click.group(cls=PlainGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="patchcore")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
def main(debug: bool) -> None:
    """PatchCore: train with anomalib, export one folder (a bundle), serve it on a CPU without torch."""
    del debug  # the group reads it
    if hasattr(sys.stdout, "reconfigure"):  # a name may have characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


for command in (
    doctor,
    check,
    tune,
    training.train,
    training.fit,
    training.test,
    training.anomalib_command,
    training.export,
    bundles.info,
    bundles.validate,
    predict,
    watch,
    bundles.explain,
    bundles.benchmark,
    bundles.pack,
    update,
    evaluate,
    training.demo,
):
    main.add_command(command)
