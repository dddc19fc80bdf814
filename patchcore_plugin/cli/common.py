"""What the commands of ``patchcore`` share: errors as sentences, choices of options, progress, tables of trials."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from patchcore_plugin.errors import PatchcoreError, UsageError
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from rich.progress import TaskID

    from patchcore_plugin import progress
    from patchcore_plugin.bundle import Manifest

_EXTRAS = {"bentoml": "serve", "elpv_dataset": "demo", "matplotlib": "demo", "httpx": "demo", "psutil": "demo"}
"""The extra that installs a package; ``train`` installs every other."""


FOUND = 3
"""Exit code where something was found; 2 is click's own, for a wrong option."""

fail_on = click.option(
    "--fail-on",
    type=click.Choice(["anomalous", "review"]),
    help=f"End with exit code {FOUND} if an image is anomalous; with review, also if one is to review.",
)
"""The option whose value :func:`found_code` takes."""


device = click.option(
    "--device",
    default="CPU",
    show_default=True,
    help="Device of OpenVINO that computes the network: CPU, GPU, GPU.1, NPU, AUTO, AUTO:GPU,CPU or HETERO:GPU,CPU. Another "
    "one than the CPU must give the scores of the bundle's self-test, or is refused.",
)
"""The option for the device of a runtime."""


def found_code(fail_on: str | None, verdicts: Counter[str | None]) -> int:
    """The exit code for what was found.

    Args:
        fail_on: Value of the option ``--fail-on``; None does not ask.
        verdicts: Number of images by verdict.

    Raises:
        UsageError: If the option asks, and images have no verdict.
    """
    if fail_on is None:
        return 0
    if verdicts[None]:
        msg = f"--fail-on {fail_on}: the model has no threshold, so {verdicts[None]} images have a score and no verdict."
        raise UsageError(msg)
    return FOUND if verdicts["anomalous"] or (fail_on == "review" and verdicts["review"]) else 0


class PlainGroup(click.Group):
    """A group whose commands end with one sentence and exit code 1 on any error that a user can mend.

    A bug keeps its traceback, and so does every error with ``--debug``. Help lists the commands in the order of their
    addition. On Windows, arguments stay as they are: click would replace a text such as ``part[1]`` by names of files.
    """

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the command line."""
        return super().main(*arguments, **{"windows_expand_args": False, **options})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        del ctx
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if ctx.params["debug"]:
            return super().invoke(ctx)
        with plain_errors():
            return super().invoke(ctx)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that a user can mend, and those of files, into a sentence of the command line."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package == __name__.split(".")[0]:
            raise
        extra = _EXTRAS.get(package, "train")
        msg = f"{error}. This command needs more than the base install: pip install 'patchcore-plugin[{extra}]'"
        raise click.ClickException(msg) from error
    except PatchcoreError as error:
        raise click.ClickException(_lines(error)) from error
    except BrokenPipeError:  # the reader of the output, such as head, has read enough; click ends quietly
        raise
    except OSError as error:
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        raise click.ClickException(_lines(f"{files}: {error.strerror}" if files and error.strerror else error)) from error


def _lines(message: object) -> str:
    """A message of one or more lines, without what a terminal would obey in the names that it holds."""
    return "\n".join(map(as_line, str(message).splitlines()))


def as_cell(text: object) -> Text:
    """A cell of a table that shows a name, or another text from outside, as it is: brackets are no markup."""
    return Text(as_line(str(text)))


class ManifestChoice(click.Choice):
    """A choice among the values that a type of the bundle's manifest allows.

    The manifest is imported when the values are needed, so that ``patchcore --help`` does not wait for it.

    Args:
        type_name: Name of a ``Literal`` in :mod:`patchcore_plugin.bundle`.
        *more: Values of the option beside them.
    """

    def __init__(self, type_name: str, *more: str) -> None:
        self.type_name, self.more, self.case_sensitive = type_name, more, True

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The values, in the order of the help text."""
        from patchcore_plugin import bundle

        return (*self.more, *get_args(getattr(bundle, self.type_name)))


def progress_bar() -> Progress:
    """A bar with count and remaining time, on a terminal alone; it disappears when the work is done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def step_bars() -> Iterator[progress.Progress]:
    """A bar for each step that a long function reports."""
    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                for task in bar.tasks:  # a step ends when the next one begins
                    bar.update(task.id, completed=task.total)
                tasks[step] = bar.add_task(step.capitalize())
            bar.update(tasks[step], completed=done, total=total)

        yield report


def print_trials(manifest: Manifest) -> None:
    """Print what was measured when a bundle was written: the indexes and the network's precisions that were tried."""
    for member in manifest.all_members:
        index = member.index
        if not index.trials:
            continue
        title = member.backbone if manifest.members else None
        table = Table(
            "index", "storage", "width", "ms an image", "recall@1", "error at 99.9 %", "of storage", "", title=title
        )
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
