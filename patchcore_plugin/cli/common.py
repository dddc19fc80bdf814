"""What the commands of ``patchcore`` share."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that a user can mend into one sentence instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ModuleNotFoundError as error:
            missing = {"bentoml": "serve", "elpv_dataset": "demo", "matplotlib": "demo", "httpx": "demo", "psutil": "demo"}
            extra = missing.get(error.name or "", "train")
            msg = f"{error}. This command needs more than the base install: pip install 'patchcore-plugin[{extra}]'"
            raise click.ClickException(msg) from error
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error

    return run


def progress_bar() -> Progress:
    """A bar with count and remaining time."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
