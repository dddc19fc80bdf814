"""The folder of a bundle: read, verify, write.

No file is used before all of them match their checksums, and none is ever executed or unpickled. What is compared with a
checksum is what is used: every file is read once, and a bundle that is replaced meanwhile is read as one or the other.
"""

from __future__ import annotations

import platform
import re
import reprlib
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import ValidationError

from patchcore_plugin.bundle.content import FileContent, FileState, opened_folder, parse_json, read_file
from patchcore_plugin.bundle.draft import find_left_behind
from patchcore_plugin.bundle.manifest import FILES, MANIFEST, BundleError, File, Manifest
from patchcore_plugin.errors import writing
from patchcore_plugin.names import as_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_READABLE_FORMATS = get_args(Manifest.model_fields["format_version"].annotation)
_MANIFEST_BYTES_LIMIT = 1 << 20  # a manifest has about 2,000 bytes, and with the largest calibration 800,000


@dataclass(frozen=True)
class BundleContent:
    """What the files of a bundle held at one moment. They match the checksums of the manifest.

    Attributes:
        path: Folder of the bundle.
        manifest: The manifest.
        version: Version of the bundle; see :func:`version_of`.
        files: Content of each file that the manifest lists.
        states: State of each file that was read, the manifest's too.
    """

    path: Path
    manifest: Manifest
    version: str
    files: dict[str, FileContent]
    states: dict[str, FileState]


def read_bundle(path: str | Path) -> BundleContent:
    """Read all files of a bundle, each once, and compare them with their checksums.

    Args:
        path: Folder of the bundle.

    Raises:
        BundleError: As of :func:`read_manifest` and :func:`verify`.
    """
    path = Path(path)
    with _opened(path) as folder:
        content = _read_manifest_file(path, folder)
        manifest = _parse_manifest(content)
        files = {name: _read_verified(path / name, expected, folder) for name, expected in manifest.files.items()}
    states = {MANIFEST: content.state, **{name: file.state for name, file in files.items()}}
    return BundleContent(path, manifest, _version(content), files, states)


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of a bundle, without a look at its other files.

    Args:
        path: Folder of the bundle.

    Raises:
        BundleError: If the folder or the manifest is missing, or the manifest is damaged or of another format.
    """
    return read_manifest_and_version(path)[0]


def version_of(path: str | Path) -> str:
    """Version of a bundle: the first 12 digits of its manifest's sha256. The manifest holds the other files' checksums.

    Args:
        path: Folder of the bundle.

    Raises:
        BundleError: If the manifest cannot be read.
    """
    path = Path(path)
    with _opened(path) as folder:
        return _version(_read_manifest_file(path, folder))


def read_manifest_and_version(path: str | Path) -> tuple[Manifest, str]:
    """Read the manifest of a bundle, and the version of what was read; errors are those of :func:`read_manifest`."""
    path = Path(path)
    with _opened(path) as folder:
        content = _read_manifest_file(path, folder)
    return _parse_manifest(content), _version(content)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """Open the folder of a bundle; see :func:`opened_folder`."""
    if "\0" in str(path):
        msg = f"{as_line(str(path))} is the path of no folder: it has a null byte."
        raise BundleError(msg)
    if not path.is_dir():
        place = path.resolve()
        left = find_left_behind(place.parent).get(place)
        hint = "`patchcore export CHECKPOINT BUNDLE` writes one."
        if left is not None:
            hint = f"Its last one lies in {left}, since an export to this place was killed; rename that folder."
        msg = f"There is no bundle folder {path}. {hint}"
        raise BundleError(msg)
    try:
        with opened_folder(path) as folder:
            yield folder
    except OSError as error:
        msg = f"{path} cannot be read: {error}"
        raise BundleError(msg) from error


def _read_manifest_file(path: Path, folder: int | None) -> FileContent:
    try:
        return read_file(path / MANIFEST, folder, bytes_limit=_MANIFEST_BYTES_LIMIT)
    except FileNotFoundError as error:
        msg = f"{path} is not a bundle: {MANIFEST} is missing."
        raise BundleError(msg) from error


def _version(manifest: FileContent) -> str:
    return manifest.sha256[:12]


def _parse_manifest(file: FileContent) -> Manifest:
    content = parse_json(file)
    format_version = content.get("format_version") if isinstance(content, dict) else None
    if format_version not in _READABLE_FORMATS:
        known = ", ".join(map(str, _READABLE_FORMATS))
        msg = (
            f"{file.path} has bundle format {reprlib.repr(format_version)}; this patchcore-plugin reads formats {known}. "
            "Export the model again, or install the version that wrote the bundle."
        )
        raise BundleError(msg)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{_place(item['loc'])}: {item['msg']}" for item in error.errors()[:5])
        msg = f"{file.path} is not valid: {problems}"
        raise BundleError(msg) from error


def _place(location: tuple[str | int, ...]) -> str:
    """The place of a field in the manifest. Its names may be anything."""
    return ".".join(part if re.fullmatch(r"[\w-]{1,100}", part) else reprlib.repr(part) for part in map(str, location))


def _read_verified(file: Path, expected: File, folder: int | None) -> FileContent:
    """Read a file of a bundle, and compare it with its checksum."""
    try:
        content = read_file(file, folder)
    except FileNotFoundError as error:
        msg = f"{file.parent} is incomplete: {file.name} is missing. Export or copy the bundle again."
        raise BundleError(msg) from error
    if content.state.bytes != expected.bytes:
        msg = f"{file} has {content.state.bytes} bytes, its manifest says {expected.bytes}. Export or copy the bundle again."
        raise BundleError(msg)
    if content.sha256 != expected.sha256:
        msg = f"{file} does not match its checksum: it is damaged, or not the file that was exported."
        raise BundleError(msg)
    return content


def verify(path: str | Path, manifest: Manifest) -> None:
    """Compare every file of a bundle with its checksum.

    Args:
        path: Folder of the bundle.
        manifest: Manifest of the bundle.

    Raises:
        BundleError: If a file is missing, or its size or content differs from the manifest's.
    """
    path = Path(path)
    with _opened(path) as folder:
        for name, expected in manifest.files.items():
            _read_verified(path / name, expected, folder)


def check_outside(output: str | Path, source: str | Path) -> None:
    """Refuse a folder to write into that is a folder to read, or lies in it; a file is refused by what makes the folder.

    Args:
        output: Folder to write into.
        source: Folder of a bundle, or of the images that one is made from.

    Raises:
        BundleError: If it is or does; the message names both.
    """
    output = Path(output)
    if not output.is_file() and output.resolve().is_relative_to(Path(source).resolve()):
        msg = f"{output} lies in {source}, which stays as it is. Choose another folder to write into."
        raise BundleError(msg)


def file_states(path: str | Path, names: Iterable[str] = (MANIFEST, *FILES)) -> dict[str, FileState]:
    """State of the files of a bundle that are there: what changes when the bundle is replaced.

    Args:
        path: Folder of the bundle.
        names: Files to look at.
    """
    states = {}
    for name in names:
        with suppress(OSError):
            states[name] = FileState.of((Path(path) / name).stat())
    return states


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a bundle."""
    file = Path(folder) / MANIFEST
    with writing(file):
        file.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def describe_files(folder: str | Path) -> dict[str, File]:
    """Checksum and size of each file of a bundle, as its manifest lists them."""
    folder = Path(folder)
    names = [name for name, rule in FILES.items() if rule.required or (folder / name).is_file()]
    return {name: _describe(read_file(folder / name)) for name in names}


def _describe(content: FileContent) -> File:
    return File(sha256=content.sha256, bytes=content.state.bytes)


def describe_versions(*packages: str) -> dict[str, str]:
    """Version of Python and of installed packages, as a manifest lists them."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def copy_files(path: str | Path, manifest: Manifest, target: str | Path) -> None:
    """Copy the files that the manifest of a bundle lists.

    Args:
        path: Folder of the bundle.
        manifest: Manifest of the bundle.
        target: Folder to copy to.

    Raises:
        BundleError: If the copies do not match the checksums, as when the bundle was replaced meanwhile.
    """
    for name in manifest.files:
        shutil.copyfile(Path(path) / name, Path(target) / name)
    verify(target, manifest)
