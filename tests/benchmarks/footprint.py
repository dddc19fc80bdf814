"""Disk space of every extra, time from the start of a process to its first answer, and size of a bento.

    python tests/benchmarks/footprint.py BUNDLE IMAGE

The size of an extra is that of all installed files of this package and of the packages that the extra needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import click
import common  # noqa: F401  finds tests/helpers
import httpx
from helpers.server import BENTOML, SERVE, bentoml_serve
from packaging.requirements import Requirement

ANSWER = """
import sys
from patchcore_plugin import PatchcoreRuntime
runtime = PatchcoreRuntime.load(sys.argv[1], cache=sys.argv[3] or False)
print(runtime.predict([sys.argv[2]])[0].score)
"""


def closure(name: str, extras: frozenset[str] = frozenset(), seen: set | None = None) -> set[str]:
    """Names of all installed packages that a package needs, itself included."""
    seen = set() if seen is None else seen
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return set()  # a package for another platform
    names = {name.lower().replace("_", "-")}
    for text in found.requires or ():
        requirement = Requirement(text)
        wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(requirement.marker.evaluate(context) for context in wanted):
            names |= closure(requirement.name, frozenset(requirement.extras), seen)
    return names


def size(names: set[str]) -> int:
    """Size of the installed files, in bytes."""
    total = 0
    for name in names:
        for file in distribution(name).files or ():
            path = Path(distribution(name).locate_file(file))
            total += path.stat().st_size if path.is_file() else 0
    return total


def first_answer(bundle: str, image: str, cache: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", ANSWER, bundle, image, cache], check=True, capture_output=True)
    return time.perf_counter() - started


def import_time(module: str) -> float:
    """Seconds for a process that imports a module and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - started


def first_answer_of_service(bundle: str, image: str, folder: Path) -> tuple[float, float]:
    """Seconds from the start of ``bentoml serve`` until it is ready, and until it has answered."""
    started = time.perf_counter()
    with bentoml_serve(SERVE, folder, PATCHCORE_BUNDLE=str(Path(bundle).resolve())) as url:
        ready = time.perf_counter() - started
        httpx.post(f"{url}/predict", files={"image": Path(image).read_bytes()}, timeout=60).raise_for_status()
        return ready, time.perf_counter() - started


def bento_size(bundle: str, home: Path) -> tuple[int, int]:
    """Size of the packed bento of a bundle, and of the bundle itself, in bytes."""
    environment = {**os.environ, "BENTOML_HOME": str(home)}
    root = Path(__file__).parents[2]
    for command in (
        [str(Path(sys.executable).parent / "patchcore"), "pack", bundle],
        [*BENTOML, "build", "--bentofile", str(root / "bento" / "bentofile.yaml"), str(root)],
        [*BENTOML, "export", "patchcore:latest", str(home / "patchcore.bento")],
    ):
        subprocess.run(command, env=environment, check=True, capture_output=True)
    size_of_bundle = sum(file.stat().st_size for file in Path(bundle).iterdir())
    return (home / "patchcore.bento").stat().st_size, size_of_bundle


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@click.command()
@click.argument("bundle", type=click.Path(exists=True))
@click.argument("image", type=click.Path(exists=True))
def main(bundle: str, image: str) -> None:
    """Print installed sizes, start times, and the size of a bento."""
    for extras in ((), ("serve",), ("train",), ("train", "quantize"), ("demo",), ("test",)):
        names = closure("patchcore-plugin", frozenset(extras))
        torch = "with" if "torch" in names else "without"
        title = " and ".join(extras) or "base"
        click.echo(f"{title:<16} {len(names):>4} packages {size(names) / 2**20:>7,.0f} MiB, {torch} torch")
    with tempfile.TemporaryDirectory() as cache:
        first_answer(bundle, image, "")  # the first run reads the files from disk
        plain = median([first_answer(bundle, image, "") for _ in range(5)])
        filled = first_answer(bundle, image, cache)
        cached = median([first_answer(bundle, image, cache) for _ in range(5)])
    click.echo(f"process start to first answer: {plain:.2f} s, with the compiled network kept {cached:.2f} s")
    click.echo(f"(and {filled:.2f} s where it is compiled and kept)")
    ours, theirs = (median([import_time(name) for _ in range(5)]) for name in ("patchcore_plugin.bento.service", "bentoml"))
    click.echo(f"import of the service's module: {ours:.2f} s, of bentoml alone {theirs:.2f} s, process start included")
    with tempfile.TemporaryDirectory() as temporary:
        starts = [first_answer_of_service(bundle, image, Path(temporary)) for _ in range(3)]
        ready, answered = (median(list(times)) for times in zip(*starts, strict=True))
        click.echo(f"`bentoml serve` to ready: {ready:.1f} s, to its first answer {answered:.1f} s")
        whole, model = bento_size(bundle, Path(temporary))
        click.echo(f"bento: {whole / 2**20:.1f} MiB packed, of a bundle of {model / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
