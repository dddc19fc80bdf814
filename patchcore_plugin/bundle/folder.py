"""The bundle's folder: read, verified, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import uuid
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from pydantic import ValidationError

from patchcore_plugin.bundle.manifest import FILES, MANIFEST, BundleError, File, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READABLE_FORMATS = (2, 3)  # what format 3 added may be absent
_MANIFEST_BYTES_LIMIT = 1 << 20  # a manifest has about two thousand bytes, and one with the largest calibration 800,000


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the bundle at ``path``, without looking at its other files.

    Raises:
        BundleError: If there is no bundle, or its manifest is damaged or of another version.
    """
    if not path.is_dir():
        msg = f"There is no bundle folder {path}. `patchcore export CHECKPOINT BUNDLE` writes one."
        raise BundleError(msg)
    file = path / MANIFEST
    try:
        if file.stat().st_size > _MANIFEST_BYTES_LIMIT:
            msg = f"{file} is larger than {_MANIFEST_BYTES_LIMIT} bytes: no manifest of a bundle."
            raise BundleError(msg)
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        msg = f"{path} is no bundle: {MANIFEST} is missing."
        raise BundleError(msg) from error
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, BundleError):
            raise
        msg = f"{file} is damaged: {error}"
        raise BundleError(msg) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in _READABLE_FORMATS:
        known = " and ".join(map(str, _READABLE_FORMATS))
        msg = (
            f"{file} has bundle format {version!r}; this patchcore-plugin reads formats {known}. Export the model "
            "again, or install the version that wrote the bundle."
        )
        raise BundleError(msg)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
        msg = f"{file} is not valid: {problems}"
        raise BundleError(msg) from error


def verify(path: Path, manifest: Manifest) -> None:
    """Compare every file of a bundle with its checksum.

    Raises:
        BundleError: If a file is missing, or its size or content differs from the manifest's.
    """
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            msg = f"{path} is incomplete: {name} is missing. Export or copy the bundle again."
            raise BundleError(msg)
        size = file.stat().st_size
        if size != expected.bytes:
            msg = f"{file} has {size} bytes, its manifest says {expected.bytes}. Export or copy the bundle again."
            raise BundleError(msg)
        if _sha256(file) != expected.sha256:
            msg = f"{file} does not match its checksum: it is damaged or not the file that was exported."
            raise BundleError(msg)


def version_of(path: Path) -> str:
    """A bundle's version: the first 12 digits of the sha256 of its manifest, which covers all other files' checksums.

    Raises:
        BundleError: If the manifest cannot be read.
    """
    try:
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:12]
    except OSError as error:
        msg = f"{path / MANIFEST} cannot be read: {error}"
        raise BundleError(msg) from error


def describe_files(folder: Path) -> dict[str, File]:
    """Checksums and sizes of a bundle's files, for its manifest."""
    names = [name for name, rule in FILES.items() if rule.required or (folder / name).is_file()]
    return {name: File(sha256=_sha256(folder / name), bytes=(folder / name).stat().st_size) for name in names}


def describe_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of installed packages, for a manifest."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill, and move it to ``path`` at the end.

    On any error, an interrupt too, nothing new is left and what was at ``path`` is there still.

    Raises:
        BundleError: If ``path`` exists and is not to be overwritten or is no bundle, or the folder cannot be written.
    """
    path = path.resolve()  # through a link, the folder that it names is replaced
    if path.exists():
        if not overwrite:
            msg = f"{path} exists already. Choose another folder, or pass --overwrite (overwrite=True)."
            raise BundleError(msg)
        if not path.is_dir() or not {MANIFEST} <= {file.name for file in path.iterdir()} <= {MANIFEST, *FILES}:
            msg = f"{path} is not a bundle, or holds other files too; it is not overwritten."
            raise BundleError(msg)
    unique = uuid.uuid4().hex[:8]
    draft, old = path.with_name(f".{path.name}.{unique}.tmp"), path.with_name(f".{path.name}.{unique}.old")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        msg = f"The folder {path} cannot be written: {error}"
        raise BundleError(msg) from error
    try:
        yield draft
        try:
            if path.exists():
                path.rename(old)
            draft.rename(path)
        except OSError as error:
            msg = f"The bundle cannot be moved to {path}: {error}. Is a file of the old one in use?"
            raise BundleError(msg) from error
    finally:
        if old.exists():
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(path)
        shutil.rmtree(draft, ignore_errors=True)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
