"""The folder of a bundle: read, verify, write.

A bundle is whole or absent: it is written to a draft folder beside its place, and moved there at the end. No file is used
before all of them match their checksums, and none is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import uuid
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from patchcore_plugin.bundle.manifest import FILES, MANIFEST, BundleError, File, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_READABLE_FORMATS = (2, 3)
_MANIFEST_BYTES_LIMIT = 1 << 20  # a manifest has about 2,000 bytes, and with the largest calibration 800,000


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of a bundle, without a look at its other files.

    Args:
        path: Folder of the bundle.

    Raises:
        BundleError: If the folder or the manifest is missing, or the manifest is damaged or of another format.
    """
    path = Path(path)
    if not path.is_dir():
        msg = f"There is no bundle folder {path}. `patchcore export CHECKPOINT BUNDLE` writes one."
        raise BundleError(msg)
    file = path / MANIFEST
    content = read_json(file, _MANIFEST_BYTES_LIMIT)
    format_version = content.get("format_version") if isinstance(content, dict) else None
    if format_version not in _READABLE_FORMATS:
        known = " and ".join(map(str, _READABLE_FORMATS))
        msg = (
            f"{file} has bundle format {format_version!r}; this patchcore-plugin reads formats {known}. Export the model "
            "again, or install the version that wrote the bundle."
        )
        raise BundleError(msg)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
        msg = f"{file} is not valid: {problems}"
        raise BundleError(msg) from error


def read_json(file: Path, bytes_limit: float = math.inf) -> Any:
    """Read a JSON file that may be damaged or made to harm.

    Args:
        file: File of a bundle.
        bytes_limit: Largest size of the file.

    Raises:
        BundleError: If the file is missing, too large or damaged.
    """
    try:
        if file.stat().st_size > bytes_limit:
            msg = f"it is larger than {bytes_limit} bytes"
            raise ValueError(msg)
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        msg = f"{file.parent} is not a bundle: {file.name} is missing."
        raise BundleError(msg) from error
    except (ValueError, RecursionError, OSError) as error:
        msg = f"{file} is damaged: {error}"
        raise BundleError(msg) from error


def read_array(file: Path) -> NDArray:
    """Read a NumPy array (.npy) that may be damaged or made to harm.

    Raises:
        BundleError: If the file is damaged, or holds Python objects.
    """
    try:
        with file.open("rb") as stream:  # np.load would open an archive too
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        msg = f"{file} is damaged: {error}"
        raise BundleError(msg) from error


def verify(path: str | Path, manifest: Manifest) -> None:
    """Compare every file of a bundle with its checksum.

    Args:
        path: Folder of the bundle.
        manifest: Manifest of the bundle.

    Raises:
        BundleError: If a file is missing, or its size or content differs from the manifest's.
    """
    for name, expected in manifest.files.items():
        file = Path(path) / name
        if not file.is_file():
            msg = f"{path} is incomplete: {name} is missing. Export or copy the bundle again."
            raise BundleError(msg)
        size = file.stat().st_size
        if size != expected.bytes:
            msg = f"{file} has {size} bytes, its manifest says {expected.bytes}. Export or copy the bundle again."
            raise BundleError(msg)
        if _sha256(file) != expected.sha256:
            msg = f"{file} does not match its checksum: it is damaged, or not the file that was exported."
            raise BundleError(msg)


def version_of(path: str | Path) -> str:
    """Version of a bundle: the first 12 digits of its manifest's sha256. The manifest holds the other files' checksums.

    Args:
        path: Folder of the bundle.

    Raises:
        BundleError: If the manifest cannot be read.
    """
    file = Path(path) / MANIFEST
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    except OSError as error:
        msg = f"{file} cannot be read: {error}"
        raise BundleError(msg) from error


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a bundle."""
    (Path(folder) / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def describe_files(folder: str | Path) -> dict[str, File]:
    """Checksum and size of each file of a bundle, as its manifest lists them."""
    folder = Path(folder)
    names = [name for name, rule in FILES.items() if rule.required or (folder / name).is_file()]
    return {name: File(sha256=_sha256(folder / name), bytes=(folder / name).stat().st_size) for name in names}


def describe_versions(*packages: str) -> dict[str, str]:
    """Version of Python and of installed packages, as a manifest lists them."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def copy_files(path: str | Path, manifest: Manifest, target: str | Path) -> None:
    """Copy the files that the manifest of a bundle lists.

    Args:
        path: Folder of the bundle.
        manifest: Manifest of the bundle.
        target: Folder to copy to.
    """
    for name in manifest.files:
        shutil.copyfile(Path(path) / name, Path(target) / name)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty draft folder to write a bundle into, and move it to ``path`` at the end.

    After any error, an interrupt too, ``path`` is as it was, and nothing else is left.

    Args:
        path: Folder of the bundle. Where it is a link, the folder that the link names is replaced.
        overwrite: Replace a bundle that exists at ``path``.

    Raises:
        BundleError: If ``path`` exists and may not be overwritten or is not a bundle, or if the folder cannot be written.
    """
    path = Path(path).resolve()
    if path.exists():
        _check_replaceable(path, overwrite=overwrite)
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


def _check_replaceable(path: Path, *, overwrite: bool) -> None:
    if not overwrite:
        msg = f"{path} exists already. Choose another folder, or pass --overwrite (overwrite=True)."
        raise BundleError(msg)
    if not path.is_dir() or not {MANIFEST} <= {file.name for file in path.iterdir()} <= {MANIFEST, *FILES}:
        msg = f"{path} is not a bundle, or holds other files too; it is not overwritten."
        raise BundleError(msg)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
