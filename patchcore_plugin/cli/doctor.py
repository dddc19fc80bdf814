"""The command ``patchcore doctor``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from patchcore_plugin.cli.common import as_cell, device, step_bars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from patchcore_plugin.operations.doctor import Finding, Purpose


@click.command(epilog="Example: patchcore doctor bundle --for serve")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["predict", "serve", "train"]),
    default="predict",
    show_default=True,
    help="What this machine is to be used for.",
)
@device
@click.option("--host", default="127.0.0.1", envvar="PATCHCORE_HOST", show_envvar=True, help="Address of the service.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=3000,
    show_default=True,
    envvar="PATCHCORE_PORT",
    show_envvar=True,
    help="Port of the service.",
)
@click.option("--ask-hub", is_flag=True, help="Ask over the network whether the hub with weights can be reached.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(bundle: Path | None, purpose: Purpose, device: str, host: str, port: int, ask_hub: bool, as_json: bool) -> None:
    """Show what this machine has, and how to get what it lacks.

    Looks at instruction sets, cores, memory, OpenVINO's devices, packages, weights of backbones, the service's port, and
    whether files can be written. With BUNDLE, checks it as `patchcore validate` does: its files, its self-test, the
    arithmetic that this machine computes it in, and the time of an image. Sends nothing over the network without --ask-hub.

    Exit code: 0 if nothing is missing that the purpose needs, 1 if something is, 2 after a wrong option. `predict` needs
    the base install, the device, and a sound bundle; `serve` also the extra serve and a free port; `train` the extra train
    and weights. What is merely of use is a note.
    """
    from patchcore_plugin.operations.doctor import examine

    with step_bars() as progress:
        findings = list(examine(purpose, bundle, device=device, host=host, port=port, ask_hub=ask_hub, progress=progress))
    ok = all(finding.result != "failed" for finding in findings)
    if as_json:
        click.echo(json.dumps({"for": purpose, "ok": ok, "findings": list(map(asdict, findings))}, indent=2))
    else:
        _print(findings)
        click.echo(f"This machine is {'fit' if ok else 'NOT fit'} to {purpose}.")
    if not ok:
        sys.exit(1)


def _print(findings: Sequence[Finding]) -> None:
    table = Table("", "result", "")
    for finding in findings:
        result = {"failed": "[red]failed[/red]"}.get(finding.result, finding.result)
        table.add_row(as_cell(finding.name), result, as_cell(finding.detail))
    Console().print(table)
    remedies = [finding for finding in findings if finding.remedy]
    if remedies:
        click.echo("What brings the missing:")
    for finding in remedies:
        click.echo(f"  {finding.name}: {finding.remedy}")
