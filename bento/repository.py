"""The bundles that a process serves: found by name, loaded when asked for, replaced when they change."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from patchcore_plugin.bundle import BundleError, Manifest, read_manifest, version_of
from patchcore_plugin.runtime import PatchcoreRuntime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger("patchcore.service")

_CHECK_EVERY = 1.0  # seconds between two looks at a bundle's files


class UnknownModelError(LookupError):
    """A request names a model that is not there, or none where there are several."""


@dataclass
class Entry:
    """A loaded bundle.

    Attributes:
        name: Its name in requests.
        runtime: It, ready to score.
        version: First 12 digits of the manifest's sha256, which covers all other files' checksums.
        size: Bytes of its files.
    """

    name: str
    runtime: PatchcoreRuntime
    version: str
    size: int
    _stamp: tuple = field(repr=False)
    _refused: tuple | None = field(default=None, repr=False)
    _checked: float = field(default_factory=time.monotonic, repr=False)
    _loading: bool = field(default=False, repr=False)


class Shelf:
    """Loads bundles on demand, within a limit of memory, and takes up new versions while the old ones go on.

    Args:
        places: Gives the folder of every bundle by name; asked again and again.
        load: Loads one.
        limit: Bytes of bundle files to hold; beyond it the least recently used are dropped, save the one asked for.
        loaded: Told of every attempt to load: the name, and ``"loaded"``, ``"refused"`` or ``"dropped"``.
    """

    def __init__(
        self,
        places: Callable[[], dict[str, Path]],
        load: Callable[[Path], PatchcoreRuntime],
        limit: int,
        loaded: Callable[[str, str], object] = lambda name, result: None,
    ) -> None:
        self._places, self._load, self._limit, self._loaded = places, load, limit, loaded
        self._entries: dict[str, Entry] = {}  # the least recently used first
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._found: dict[str, Path] = {}
        self._found_at = -_CHECK_EVERY

    def places(self) -> dict[str, Path]:
        """Folder of every bundle by name: those that there are, and those in memory whose folder has gone.

        A folder is gone for a moment while it is replaced.
        """
        with self._lock:
            if time.monotonic() - self._found_at >= _CHECK_EVERY:
                gone = {name: path for name, path in self._found.items() if name in self._entries}
                try:
                    found = self._places()
                except (BundleError, OSError):
                    if not gone:
                        raise
                    found = {}  # those in memory go on
                self._found, self._found_at = {**gone, **found}, time.monotonic()
            return self._found

    def names(self) -> list[str]:
        """Names of the bundles in memory, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def resolve(self, name: str | None, default: str | None = None) -> str:
        """The name of the bundle that a request asks for.

        Raises:
            UnknownModelError: If there is none of that name; or if none is named, and not exactly one to choose from.
        """
        if name is not None and name in self._entries:
            return name
        places = self.places()
        wanted = name or default
        if wanted is None and len(places) == 1:
            return next(iter(places))
        if wanted in places:
            return wanted
        names = ", ".join(sorted(places)) or "none"
        said = f"There is no model {wanted!r}." if wanted else "The request names no model, and there is not just one."
        msg = f"{said} Models: {names}."
        raise UnknownModelError(msg)

    def get(self, name: str) -> Entry:
        """The bundle of a name that :meth:`resolve` gave, loaded.

        Raises:
            BundleError: If it is not in memory and cannot be loaded.
        """
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is not None:
                self._entries[name] = entry  # the most recently used
        if entry is not None:
            self._look(entry)
            return entry
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:  # others wait for the first to have loaded it
            with self._lock:
                entry = self._entries.get(name)
            return entry or self._put(name)

    def _put(self, name: str) -> Entry:
        path = self.places().get(name)
        if path is None:
            msg = f"The bundle {name!r} has gone."
            raise BundleError(msg)
        stamp = _stamp(path)
        try:
            entry = _open(name, path, stamp, self._load)
        except (BundleError, OSError) as error:
            self._loaded(name, "refused")
            logger.error("The bundle %s cannot be served: %s", name, error)
            raise error if isinstance(error, BundleError) else BundleError(str(error)) from error
        with self._lock:
            self._entries.pop(name, None)
            self._entries[name] = entry
            while sum(other.size for other in self._entries.values()) > self._limit and len(self._entries) > 1:
                oldest = next(iter(self._entries))
                del self._entries[oldest]  # requests that hold it finish
                self._loaded(oldest, "dropped")
        self._loaded(name, "loaded")
        logger.info("The bundle %s is loaded, version %s", name, entry.version)
        return entry

    def _look(self, entry: Entry) -> None:
        """Load the bundle's new version in the background, if its files have changed."""
        with self._lock:
            now = time.monotonic()
            if entry._loading or now - entry._checked < _CHECK_EVERY:
                return
            entry._checked = now
        path = self.places().get(entry.name)
        stamp = None if path is None else _stamp(path)
        if stamp is None or stamp in (entry._stamp, entry._refused):  # gone for the moment, the same, or bad
            return
        with self._lock:
            if entry._loading:
                return
            entry._loading = True
        threading.Thread(target=self._replace, args=(entry, stamp), name=f"load-{entry.name}", daemon=True).start()

    def _replace(self, entry: Entry, stamp: tuple) -> None:
        try:
            self._put(entry.name)
        except BundleError:
            logger.warning("The bundle %s stays at version %s", entry.name, entry.version)
            entry._refused = stamp
        finally:
            entry._loading = False


def describe(path: Path) -> tuple[Manifest, str]:
    """Manifest and version of the bundle at ``path``, without loading it.

    Raises:
        BundleError: If it cannot be read.
    """
    return read_manifest(path), version_of(path)


def _open(name: str, path: Path, stamp: tuple | None, load: Callable[[Path], PatchcoreRuntime]) -> Entry:
    version = version_of(path)
    runtime = load(path)
    black = np.zeros((*runtime.manifest.preprocessing.resize, 3), np.uint8)
    try:
        runtime.predict([black])  # the first takes longer than others
    except Exception as error:  # of OpenVINO or FAISS
        msg = f"{path} cannot score an image: {error}"
        raise BundleError(msg) from error
    return Entry(name=name, runtime=runtime, version=version, size=runtime.manifest.total_bytes, _stamp=stamp)


def _stamp(path: Path) -> tuple | None:
    """What changes when a bundle is replaced or rewritten; None while it is not there."""
    try:
        files = sorted(path.iterdir())
        states = [file.stat() for file in files]
    except OSError:
        return None
    return (str(path), *((file.name, state.st_mtime_ns, state.st_size) for file, state in zip(files, states, strict=True)))
