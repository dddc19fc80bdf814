"""The models that a process serves: found by name, loaded when a request asks for them, replaced when their files change."""

from __future__ import annotations

import math
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
import numpy as np
from bentoml.exceptions import NotFound

from patchcore_plugin.bundle import MANIFEST, BundleError, file_states, find_left_behind, read_manifest
from patchcore_plugin.depth import from_pixels
from patchcore_plugin.errors import PatchcoreError
from patchcore_plugin.runtime import PatchcoreRuntime

from .logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchcore_plugin.bundle import FileState

    from .metrics import Metrics
    from .settings import Settings

STORE_NAME = "patchcore"
"""Name of the model in BentoML's store; in a bento, the alias of the model that was built in."""

_SECONDS_BETWEEN_LOOKS = 0.5  # at the files of models in memory, at least
_SECONDS_TO_NEXT_TRY = 60  # of a bundle that could not be loaded for a reason that may pass


class UnknownModelError(PatchcoreError, LookupError):
    """A request names a model that does not exist, or names none where there are several."""


@dataclass
class _Entry:
    """A model in memory, and what is known of its folder.

    Attributes:
        runtime: The loaded bundle.
        checked_at: When the files were last compared, by the monotonic clock.
        reloading: Whether a thread loads a new version.
    """

    runtime: PatchcoreRuntime
    checked_at: float = field(default_factory=time.monotonic)
    reloading: bool = False

    @property
    def bytes(self) -> int:
        """Size of the bundle's files."""
        return self.runtime.manifest.total_bytes


@dataclass(frozen=True)
class _Refusal:
    """A bundle that cannot be loaded.

    Attributes:
        path: Its folder.
        states: State of its files.
        error: The reason.
        until: Time, by the monotonic clock, until which the same files are not tried again.
    """

    path: Path
    states: dict[str, FileState]
    error: BundleError
    until: float

    def holds(self, path: Path) -> bool:
        """Whether the bundle is still the one that was refused."""
        return path == self.path and file_states(path) == self.states and time.monotonic() < self.until


class ModelRepository:
    """Loads models on demand, within a limit of memory, and replaces a model while its old version goes on answering.

    Args:
        find: Function that returns the folder of every bundle by name. It is called again and again.
        load: Function that loads the bundle in a folder.
        max_bytes: Bytes of bundle files to keep loaded. Beyond it the least recently used models are dropped; the model
            that was asked for stays.
        default: Name of the model for requests that name none.
        check_interval: Seconds between two looks at folders and files.
        on_load: Function that is called after every attempt to load, with the name and ``"loaded"``, ``"refused"`` or
            ``"dropped"``.
    """

    def __init__(
        self,
        find: Callable[[], dict[str, Path]],
        load: Callable[[Path], PatchcoreRuntime],
        max_bytes: int,
        *,
        default: str | None = None,
        check_interval: float = 1.0,
        on_load: Callable[[str, str], object] = lambda name, result: None,
    ) -> None:
        self.default = default
        self._find, self._load, self._max_bytes = find, load, max_bytes
        self._check_interval, self._on_load = check_interval, on_load
        self._entries: dict[str, _Entry] = {}  # the least recently used first
        self._lock = threading.Lock()
        self._refusals: dict[str, _Refusal] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._folders: dict[str, Path] = {}
        self._found_at = -check_interval
        self._looks = False

    def folders(self) -> dict[str, Path]:
        """Folder of every bundle by name.

        A bundle in memory is listed even while its folder is missing, as it is for a moment when it is replaced.
        """
        with self._lock:
            if time.monotonic() - self._found_at >= self._check_interval:
                in_memory = {name: path for name, path in self._folders.items() if name in self._entries}
                try:
                    found = self._find()
                except (BundleError, OSError) as error:
                    if not in_memory:
                        raise BundleError(str(error)) from error
                    found = {}
                self._folders, self._found_at = {**in_memory, **found}, time.monotonic()
            return self._folders

    def loaded(self) -> dict[str, PatchcoreRuntime]:
        """Each model in memory, by name, the least recently used first."""
        with self._lock:
            return {name: entry.runtime for name, entry in self._entries.items()}

    def resolve(self, name: str | None) -> str:
        """Find the name of the model that a request asks for.

        Args:
            name: The name that the request gives; None takes the default model, or the only one.

        Raises:
            UnknownModelError: If no model has the name; or if there is neither a name nor a default, and not exactly one
                model.
        """
        if name is not None and name in self._entries:
            return name
        folders = self.folders()
        wanted = name or self.default
        if wanted is None and len(folders) == 1:
            return next(iter(folders))
        if wanted in folders:
            return wanted
        names = ", ".join(sorted(folders)) or "none"
        reason = (
            f"There is no model {wanted[:200]!r}." if wanted else "The request names no model, and there is not just one."
        )
        advice = "" if wanted else " Name one in the field model, or set PATCHCORE_DEFAULT_MODEL."
        msg = f"{reason} Models: {names}.{advice}"
        raise UnknownModelError(msg)

    def get(self, name: str) -> PatchcoreRuntime:
        """Load a model, or take it from memory.

        Args:
            name: Name that :meth:`resolve` returned.

        Raises:
            BundleError: If the model is not in memory and cannot be loaded.
        """
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is not None:
                self._entries[name] = entry  # the most recently used is last
        if entry is not None:
            self._reload_if_changed(name, entry)
            return entry.runtime
        with self._lock:
            loading = self._loading.setdefault(name, threading.Lock())
        with loading:  # the first request loads, the others wait for it
            with self._lock:
                entry = self._entries.get(name)
            return entry.runtime if entry else self._put(name)

    def preload(self) -> bool:
        """Load the model for requests that name none, so that the first one does not wait.

        Returns:
            False if the model cannot be loaded. True also where such requests have no model.
        """
        try:
            with suppress(UnknownModelError):
                self.get(self.resolve(None))
        except BundleError:  # it has been logged
            return False
        return True

    def _put(self, name: str) -> PatchcoreRuntime:
        """Load a model, and make room for it."""
        path = self.folders().get(name)
        if path is None:
            msg = f"The bundle {name!r} has gone."
            raise BundleError(msg)
        refusal = self._refusals.get(name)
        if refusal is not None and refusal.holds(path):
            raise BundleError(str(refusal.error)) from refusal.error
        states = file_states(path)
        try:
            entry = _Entry(_load_and_warm_up(path, self._load))
        except Exception as error:  # whatever it is, the same files would raise it again
            refused = BundleError(str(error) if isinstance(error, BundleError) else f"{path} cannot be loaded: {error!r}")
            if states == file_states(path):  # else they were replaced while they were read
                until = time.monotonic() + _SECONDS_TO_NEXT_TRY if _may_pass(error) else math.inf
                self._refusals[name] = _Refusal(path, states, refused, until)
            self._on_load(name, "refused")
            logger.error("The bundle %s cannot be served: %s", name, refused)
            raise refused from error
        self._refusals.pop(name, None)
        with self._lock:
            self._entries.pop(name, None)
            self._entries[name] = entry
            starts, self._looks = not self._looks, True
            while sum(other.bytes for other in self._entries.values()) > self._max_bytes and len(self._entries) > 1:
                oldest = next(iter(self._entries))
                del self._entries[oldest]  # requests that hold its runtime finish
                self._on_load(oldest, "dropped")
        if starts:
            threading.Thread(target=_look_for_ever, args=(weakref.ref(self), self._check_interval), daemon=True).start()
        self._on_load(name, "loaded")
        loaded = entry.runtime
        logger.info("The bundle %s is loaded, version %s, network on %s", name, loaded.version, loaded.device)
        return entry.runtime

    def look(self) -> None:
        """Begin to load the new versions of models in memory whose files have changed."""
        with self._lock:
            entries = list(self._entries.items())
        for name, entry in entries:
            self._reload_if_changed(name, entry)

    def _reload_if_changed(self, name: str, entry: _Entry) -> None:
        """Load the new version of a bundle in the background, if its files have changed."""
        with self._lock:
            now = time.monotonic()
            if entry.reloading or now - entry.checked_at < self._check_interval:
                return
            entry.checked_at = now
        path = self.folders().get(name)
        loaded, refusal = entry.runtime.states, self._refusals.get(name)
        states = {} if path is None else file_states(path, loaded)
        if MANIFEST not in states or states == loaded:  # absent for the moment, or unchanged
            return
        if refusal is not None and refusal.holds(path):
            return
        with self._lock:
            if entry.reloading:
                return
            entry.reloading = True
        threading.Thread(target=self._reload, args=(name, entry), name=f"load-{name}", daemon=True).start()

    def _reload(self, name: str, entry: _Entry) -> None:
        try:
            self._put(name)
        except BundleError:
            logger.warning("The bundle %s stays at version %s", name, entry.runtime.version)
        finally:
            entry.reloading = False


def _look_for_ever(repository: weakref.ref[ModelRepository], seconds: float) -> None:
    """Look at the files of models in memory while no request does: the first image after a swap gets the new version."""
    while True:
        time.sleep(max(seconds, _SECONDS_BETWEEN_LOOKS))
        found = repository()
        if found is None:
            return
        with suppress(BundleError, OSError):  # a request will say it
            found.look()
        del found


def make_repository(settings: Settings, metrics: Metrics) -> ModelRepository:
    """The model repository of a process, as the settings describe it."""
    in_store = settings.bundle is None and settings.bundles is None  # where a cache's folder would look like a model
    load = partial(
        PatchcoreRuntime.load,
        mode=settings.mode,
        threads=settings.threads,
        cache=settings.cache or not in_store,
        device=settings.device,
    )
    return ModelRepository(
        partial(find_bundles, settings),
        load,
        settings.memory << 20,
        default=settings.default_model,
        on_load=lambda name, result: metrics.loads.labels(model=name, result=result).inc(),
    )


def find_bundles(settings: Settings) -> dict[str, Path]:
    """Folder of every bundle that may be served, by the name that requests give.

    Raises:
        BundleError: If there is nothing to serve.
    """
    if settings.bundles is not None:
        if not settings.bundles.is_dir():
            msg = f"PATCHCORE_BUNDLES: there is no folder {settings.bundles}."
            raise BundleError(msg)
        for path, old in find_left_behind(settings.bundles).items():
            _warn_once(f"{path} is missing. It lies in {old} since an export was killed; rename that folder.")
        return {path.name: path for path in sorted(settings.bundles.iterdir()) if _holds_bundle(path)}
    path = settings.bundle or _path_in_store()
    return {_first_name(path): path}


def _holds_bundle(path: Path) -> bool:
    """Whether an entry of the folder of bundles is one; logs why an entry that may be meant as one is not."""
    if path.name.startswith("."):
        return False
    try:
        if path.is_symlink() and not path.exists():
            _warn_once(f"{path} is a link to nothing, and is left out of the bundles.")
        return (path / MANIFEST).is_file()
    except OSError as error:
        _warn_once(f"{path} is left out of the bundles: {error}")
        return False


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _path_in_store() -> Path:
    try:
        return Path(bentoml.models.get(STORE_NAME).path)
    except NotFound as error:
        msg = (
            "There is no model to serve. Set PATCHCORE_BUNDLE to a bundle's folder, PATCHCORE_BUNDLES to a folder of "
            "several, or put one into BentoML's model store with `patchcore pack BUNDLE`."
        )
        raise BundleError(msg) from error


@cache
def _first_name(path: Path) -> str:
    """The name in the manifest of the first bundle at a path. A bundle that replaces it answers to the same name."""
    return read_manifest(path).name


def _load_and_warm_up(path: Path, load: Callable[[Path], PatchcoreRuntime]) -> PatchcoreRuntime:
    runtime = load(path)
    black = from_pixels(np.zeros((*runtime.manifest.preprocessing.resize, 3), np.uint8), runtime.intensity_range)
    try:
        runtime.predict([black])  # the first image takes longer than others
    except Exception as error:  # OpenVINO and FAISS have errors of their own
        msg = f"{path} cannot score an image: {error}"
        raise BundleError(msg) from error
    return runtime


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error comes from the machine rather than from the files: too little memory, too many open files."""
    return error is not None and (isinstance(error, OSError | MemoryError) or _may_pass(error.__cause__))
