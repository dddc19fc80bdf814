"""The command ``patchcore watch``."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchcore_plugin.cli.common import device, fail_on, found_code
from patchcore_plugin.errors import UsageError
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from patchcore_plugin.watching import Scorer, Summary


@click.command(
    epilog="Examples: patchcore watch bundle /data/camera --move /data/done --webhook http://127.0.0.1:1880/patchcore; "
    "patchcore watch my_part /data/camera --url http://127.0.0.1:3000"
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--url", help="Address of a running service that scores; BUNDLE is then the name of its model.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder for results, heatmaps and state, on a disk of this computer.  [default: FOLDER.watch beside FOLDER]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "jsonl"]),
    default="csv",
    show_default=True,
    help="Write results.csv, or results.jsonl: a JSON object a line, with the regions.",
)
@click.option("--heatmaps/--no-heatmaps", default=True, show_default=True, help="Write a heatmap PNG per image.")
@click.option(
    "--move",
    type=click.Path(path_type=Path),
    help="Move each file that is answered to a folder in here: normal, anomalous, review, none (no verdict) or unreadable.",
)
@click.option(
    "--webhook",
    envvar="PATCHCORE_WEBHOOK",
    show_envvar=True,
    help="URL that is told of every image that is not normal, and of unreadable files.",
)
@click.option(
    "--poll",
    type=click.FloatRange(0.01, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks at FOLDER.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    show_default=True,
    help="Seconds until a file that cannot be read counts as unreadable.",
)
@click.option("--once", is_flag=True, help="Answer what is there now, and end.")
@device
@fail_on
def watch(
    bundle: Path,
    folder: Path,
    url: str | None,
    output: Path | None,
    form: str,
    heatmaps: bool,
    move: Path | None,
    webhook: str | None,
    poll: float,
    patience: float,
    once: bool,
    device: str,
    fail_on: str | None,
) -> None:
    r"""Answer each new image in FOLDER once, until Ctrl+C.

    Answers what is in FOLDER and its subfolders, and then every new image. A file is read when its size and time have stayed
    the same between two looks. A camera's program is safest if it writes under a hidden name, or one that ends in .tmp, and
    renames the file. One that reuses a name is answered again. A file that cannot be read is tried again for a while, and
    then answered as unreadable; it holds up no other.

    Each file gets one line in the results, even if this command is killed or the power fails, or a spreadsheet has the file
    open meanwhile. Results may be moved away at any time, and begin anew. A second watch with the same --output is refused.
    Without --move, files stay where they are, and their names in the state; to answer them again, delete --output.

    While a disk is full, or the service of --url is down, images wait. A bundle that is replaced answers from the next image
    on. --once ends with exit code 1 if files could not be read or drawn, or are still written.

    The keys are environment variables: PATCHCORE_API_KEY of the service, and PATCHCORE_WEBHOOK_SECRET, which signs what the
    webhook is told (bento/README.md says how).
    """
    from patchcore_plugin.bundle import check_outside
    from patchcore_plugin.watching import Options, RuntimeScorer, ServiceScorer
    from patchcore_plugin.watching import watch as run
    from patchcore_plugin.webhook import Receiver

    if fail_on is not None and not once:
        msg = "--fail-on tells by the exit code of --once; without it, a watch goes on. --webhook tells of each image."
        raise UsageError(msg)
    if url is not None and device != "CPU":
        msg = f"--device {device} has no effect with --url: the service computes, on the device of its PATCHCORE_DEVICE."
        raise UsageError(msg)
    secret = os.environ.get("PATCHCORE_WEBHOOK_SECRET") or None
    if output is None:
        output = folder.resolve().with_name(f"{folder.resolve().name}.watch")
    options = Options(
        output, form, heatmaps, move, poll, patience, once, receiver=Receiver(webhook, secret) if webhook else None
    )
    scorer: Scorer
    if url is None:
        for other in (output, move):
            if other is not None:
                check_outside(other, bundle)
        scorer = RuntimeScorer(bundle, device)
    else:
        scorer = ServiceScorer(url, str(bundle), os.environ.get("PATCHCORE_API_KEY") or None)
    with _end_by_signals() as end:
        click.echo(f"Watching {as_line(str(folder))}. Results: {output / f'results.{form}'}")
        summary = run(folder, scorer, options, end, _print)
    click.echo(_describe(summary))
    if once:
        sys.exit(1 if summary.unreadable or summary.undrawn or summary.left else found_code(fail_on, summary.verdicts))


@contextmanager
def _end_by_signals() -> Iterator[threading.Event]:
    """Let Ctrl+C, and the signals that end a process, set an event; a second one ends the process at once."""
    end, before = threading.Event(), {}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        end.set()
        signal.signal(number, before[number])

    for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(result: dict[str, Any]) -> None:
    """Print what is not normal."""
    if result["score"] is None:
        said = f"unreadable, {as_line(result['error'] or '')}"
    elif result["verdict"] not in (None, "normal"):
        threshold = "none" if result["threshold"] is None else f"{result['threshold']:.4g}"
        said = f"{result['verdict']}, score {result['score']:.4g}, threshold {threshold}"
    else:
        return
    with suppress(OSError):  # nobody reads it any more, and the results have it too
        click.echo(f"{result['time']} {as_line(result['image'])}: {said}")


def _describe(summary: Summary) -> str:
    verdicts = [
        f"{number} {verdict or 'without a verdict'}" for verdict, number in sorted(summary.verdicts.items(), key=str)
    ]
    parts = [*verdicts, f"{summary.unreadable} unreadable"]
    if summary.undrawn:
        parts.append(f"{summary.undrawn} without a heatmap")
    if summary.left:
        parts.append(f"{summary.left} not answered yet")
    waiting = f" {summary.events} events of the webhook wait for the next start." if summary.events else ""
    return f"{summary.answers} files: {', '.join(parts)}.{waiting}"
