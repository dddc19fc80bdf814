"""A folder that is whole or absent: it is written to a draft beside its place, and moved there at the end.

Names beside a bundle ``NAME``, where X is different for each writer: ``.NAME.X.tmp`` is a draft, and ``.NAME.X.old`` the
bundle that the draft replaces. A writer that is ended by an error or a signal removes its own. Where one was killed, the
next writer to the same place removes them, or puts the old bundle back.

A writer locks its draft, so that others know that it lives. Windows, and some network file systems, cannot lock a folder:
there a draft counts as left behind after a day.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from patchcore_plugin.bundle.content import read_file
from patchcore_plugin.bundle.manifest import FILES, MANIFEST, BundleError
from patchcore_plugin.moving import rename

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_DRAFT_SECONDS_LIMIT = 86_400  # age from which a draft that cannot be locked counts as left behind


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty draft folder to write a bundle into, and move it to ``path`` at the end.

    After any error, an interrupt or a signal that ends the process too, ``path`` is as it was, and nothing else is left.
    Nothing is replaced but the bundle that was there at the beginning.

    Args:
        path: Folder of the bundle. Where it is a link, the folder that the link names is replaced.
        overwrite: Replace a bundle that exists at ``path``.

    Raises:
        BundleError: If ``path`` exists and may not be overwritten or is not a bundle; if it appears or changes meanwhile; or
            if the folder cannot be written.
    """
    path = Path(path).resolve()
    with ended_by_signals():
        _clear(path)
        replaced = _Replaced.of(path, overwrite=overwrite) if path.exists() else None
        draft, lock = _make_draft(path)
        try:
            yield draft
            _move_into_place(draft, path, replaced)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            if lock is not None:
                os.close(lock)


class _Replaced(NamedTuple):
    """What tells a bundle that is to be replaced from any other: the system's numbers of the folder, and the manifest."""

    device: int
    number: int
    manifest: str

    @classmethod
    def of(cls, path: Path, *, overwrite: bool = True) -> _Replaced:
        if not overwrite:
            msg = f"{path} exists already. Choose another folder, or pass --overwrite (overwrite=True)."
            raise BundleError(msg)
        if not path.is_dir() or not {MANIFEST} <= {file.name for file in path.iterdir()} <= {MANIFEST, *FILES}:
            msg = f"{path} is not a bundle, or holds other files too; it is not overwritten."
            raise BundleError(msg)
        status = path.stat()
        return cls(status.st_dev, status.st_ino, read_file(path / MANIFEST).sha256)


def _make_draft(path: Path) -> tuple[Path, int | None]:
    """Make and lock a draft; returns the lock's descriptor, None where folders cannot be locked."""
    try:
        while True:
            draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            draft.mkdir(parents=True)
            with suppress(FileNotFoundError):  # another writer took it for left behind, in the moment before it was locked
                lock = lock_folder(draft)
                if draft.exists():
                    return draft, lock
    except OSError as error:
        msg = f"The folder {path} cannot be written: {error}"
        raise BundleError(msg) from error


def lock_folder(folder: Path, *, wait: bool = True) -> int | None:
    """Lock a folder against other processes, until the descriptor is closed or this process ends, however it does.

    Args:
        folder: Folder to lock.
        wait: Wait for another process that has locked it.

    Returns:
        The descriptor; None where the system cannot lock a folder.

    Raises:
        BlockingIOError: If another process has locked the folder, and ``wait`` is False.
        FileNotFoundError: If there is no such folder.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _move_into_place(draft: Path, path: Path, replaced: _Replaced | None) -> None:
    old = draft.with_suffix(".old")
    try:
        if replaced is not None:
            rename(path, old)
            if _Replaced.of(old) != replaced:
                msg = f"{path} has changed since the writing of the new bundle began; it is not overwritten."
                raise BundleError(msg)
        _move(draft, path)
    except FileExistsError as error:
        _put_back(old, path)
        msg = f"{path} has appeared since the writing of the bundle began; it is not replaced. Choose another folder."
        raise BundleError(msg) from error
    except OSError as error:
        _put_back(old, path)
        msg = f"The bundle cannot be moved to {path}: {error}. Is a file of the old one in use?"
        raise BundleError(msg) from error
    except BaseException:
        if draft.exists():  # else it has been moved
            _put_back(old, path)
        raise
    finally:
        if not draft.exists():
            shutil.rmtree(old, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    """Move a folder to a path where nothing is.

    Raises:
        FileExistsError: If something is there.
    """
    if os.name == "nt":  # where a rename replaces nothing
        rename(folder, target)
        return
    target.mkdir()  # a rename replaces an empty folder, and this one is ours
    try:
        folder.rename(target)
    except BaseException:
        with suppress(OSError):
            target.rmdir()
        raise


def _put_back(old: Path, path: Path) -> None:
    """Move the old bundle back to its place, or to a name beside it that nobody removes."""
    if not old.exists():
        return
    try:
        _move(old, path)
    except OSError as error:
        kept = old.with_name(old.name.removeprefix("."))
        with suppress(OSError):
            rename(old, kept)
        msg = f"{path} has appeared since the writing of the bundle began. The bundle that was there before lies in {kept}."
        raise BundleError(msg) from error


def _clear(path: Path) -> None:
    """Remove what writers to a path left when they were killed, and put the old bundle back where it is missing."""
    for draft in _beside(path, "tmp"):
        with suppress(OSError):
            lock = _lock_left_draft(draft)
            old = draft.with_suffix(".old")
            if old.exists() and not path.exists():
                _move(old, path)
            shutil.rmtree(draft, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    for old in _beside(path, "old"):
        if path.exists() and not old.with_suffix(".tmp").exists():
            shutil.rmtree(old, ignore_errors=True)


def find_left_behind(folder: Path) -> dict[Path, Path]:
    """Find the bundles in a folder that are not in their place, since a writer was killed while it replaced them.

    Args:
        folder: Folder to look into.

    Returns:
        Where each bundle lies, by its place.
    """
    found = {}
    for old in _entries(folder, r"\.(.+)\.[0-9a-f]{8}\.old"):
        path = old.with_name(old.name[1 : -len(".12345678.old")])
        if path.exists():
            continue
        try:
            lock = _lock_left_draft(old.with_suffix(".tmp"))
        except FileNotFoundError:
            lock = None
        except OSError:  # the writer is at work
            continue
        if lock is not None:
            os.close(lock)
        found[path] = old
    return found


def _beside(path: Path, suffix: str) -> list[Path]:
    """Drafts of a path, or bundles that they replace."""
    return _entries(path.parent, rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.{suffix}")


def _entries(folder: Path, name: str) -> list[Path]:
    """Entries of a folder whose names match an expression; none where there is no such folder."""
    try:
        return [entry for entry in folder.iterdir() if re.fullmatch(name, entry.name)]
    except OSError:
        return []


def _lock_left_draft(draft: Path) -> int | None:
    """Lock a draft whose writer no longer lives; see :func:`lock_folder`.

    Raises:
        OSError: If the draft's writer lives, or may live, or there is no such draft.
    """
    lock = lock_folder(draft, wait=False)
    if lock is None and time.time() - draft.stat().st_mtime < _DRAFT_SECONDS_LIMIT:
        msg = f"{draft} may be in use"
        raise BlockingIOError(msg)
    return lock


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let the signals that end a process raise SystemExit, so that what was begun is cleared away first.

    Signals that the program handles, or ignores, stay as they are; so do all signals on another thread than the main one,
    where Python cannot set a handler.
    """
    numbers = []
    if threading.current_thread() is threading.main_thread():
        known = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGBREAK"))
        numbers = [number for number in known if number is not None and signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_IGN)  # a second one must not end the clearing away
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
