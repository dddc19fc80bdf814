"""The base class of every error that a user can cause and mend, and errors of files that are written."""

from __future__ import annotations

import errno
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class PatchcoreError(Exception):
    """Base class of the errors that a user can cause and mend; the message names the bad value and the way out.

    The command line prints such an error as one sentence. Any other exception is a bug of this package and keeps its
    traceback.
    """


class UsageError(PatchcoreError, ValueError):
    """An argument, or the data that an argument names, does not fit; the message names it and what would fit."""


class MissingPackageError(PatchcoreError, ImportError):
    """A package that only a part of this one needs is not installed; the message says how to install it."""


def is_full_disk(error: Exception) -> bool:
    """Whether a file cannot be written because its disk, or its user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def reason_of(error: Exception) -> str:
    """Why something failed, in a few words: without the name of a file, which a system adds to its own."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that could not be written, where the error of what wrote it does not.

    On a full disk NumPy tells of the items written, FAISS of its own source file, and OpenVINO of an iostream.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter are FAISS's and OpenVINO's
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        free = ""
        with suppress(OSError):
            free = f", with {shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free on its disk"
        msg = f"{path} cannot be written{free}: {error}"
        raise OSError(msg) from error
