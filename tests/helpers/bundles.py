"""Change a bundle's files, to test what is said of damaged and hostile ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from patchcore_plugin.bundle import MANIFEST, describe_files

if TYPE_CHECKING:
    from pathlib import Path


def change_manifest(folder: Path, **changes: object) -> None:
    """Replace fields of a bundle's manifest, which gives the bundle another version."""
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **changes}))


def set_intensity_range(folder: Path, intensity_range: list[float]) -> None:
    """Make a bundle of 8-bit images one for deeper images."""
    preprocessing = json.loads((folder / MANIFEST).read_text())["preprocessing"]
    change_manifest(folder, format_version=4, preprocessing={**preprocessing, "intensity_range": intensity_range})


def renew_checksums(folder: Path) -> None:
    """Make the manifest fit the files of a bundle after they were changed on purpose."""
    change_manifest(folder, files={name: file.model_dump() for name, file in describe_files(folder).items()})
