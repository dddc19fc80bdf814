"""What a package index has for this project: versions for other platforms and Pythons, found by uv and by pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from helpers.training import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


class Platform(NamedTuple):
    """A platform, as uv and as pip name it."""

    uv: str
    pip: tuple[str, ...]


def _linux(machine: str, glibc: int) -> Platform:
    older = (f"manylinux_2_{minor}_{machine}" for minor in range(17, glibc + 1))
    return Platform(f"{machine}-manylinux_2_{glibc}", (f"manylinux2014_{machine}", *older))


PLATFORMS = {
    "Linux x86-64, glibc 2.28": _linux("x86_64", 28),
    "Linux ARM64, glibc 2.35": _linux("aarch64", 35),
    "macOS 14, ARM": Platform("aarch64-apple-darwin", ("macosx_14_0_arm64",)),
    "Windows x86-64": Platform("x86_64-pc-windows-msvc", ("win_amd64",)),
}
"""The oldest ones that all packages have wheels for. OpenVINO wants glibc 2.35 on ARM, and FAISS macOS 14."""


class ResolutionError(Exception):
    """No set of packages satisfies the requirements; the message is uv's or pip's."""


def uv(*arguments: str, text: str | None = None) -> str:
    """Run uv, and return what it prints.

    Raises:
        ResolutionError: If it fails.
    """
    return _run([shutil.which("uv") or f"{sys.prefix}/bin/uv", *arguments], text)


def _run(command: list[str], text: str | None = None) -> str:
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}  # for uv, which would take an older one
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=text, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise ResolutionError(done.stderr.strip())
    return done.stdout


def resolve(extra: str, platform: Platform, python: str) -> dict[str, str]:
    """Resolve this project with an extra for a platform, from wheels alone; returns versions by name.

    uv does it, as it takes markers such as ``sys_platform != 'win32'`` for those of the platform. pip would take them for
    those of the Python that runs it, whatever ``--platform`` says.

    Raises:
        ResolutionError: If a package has no wheel for the platform.
    """
    target = ("--python-platform", platform.uv, "--python-version", python, "--only-binary", ":all:")
    listed = uv("pip", "compile", "pyproject.toml", "--extra", extra, *target, "--quiet", "--no-header", "--no-annotate")
    return dict(re.findall(r"^([\w.-]+)==(\S+)", listed, re.MULTILINE))


def check_wheels(versions: dict[str, str], platform: Platform, python: str) -> None:
    """Let pip look for a wheel of each package for a platform, nothing being installed. Markers have no part in it.

    Raises:
        ResolutionError: If one has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run(
            [
                *(sys.executable, "-m", "pip", "install", "--dry-run", "--target", folder, "--no-deps"),
                "--ignore-requires-python",  # of the Python that runs pip; uv has looked at the other one's
                *("--only-binary=:all:", "--quiet", "--quiet", "--disable-pip-version-check", "--python-version", python),
                *(word for name in platform.pip for word in ("--platform", name)),
                *(f"{name}=={version}" for name, version in versions.items()),
            ]
        )
