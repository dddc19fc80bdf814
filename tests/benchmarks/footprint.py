"""What serving needs: size on disk against training's, and the time from process start to first answer.

    python tests/benchmarks/footprint.py BUNDLE IMAGE

Sizes are those of the installed files of every package that an extra pulls in, itself included.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import click
from packaging.requirements import Requirement

ANSWER = """
import sys
from patchcore_plugin import PatchcoreRuntime
runtime = PatchcoreRuntime.load(sys.argv[1], cache=sys.argv[3] or False)
print(runtime.predict([sys.argv[2]])[0].score)
"""


def closure(name: str, extras: frozenset[str] = frozenset(), seen: set | None = None) -> set[str]:
    """Names of all packages that a package needs, as they are installed here."""
    seen = set() if seen is None else seen
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return set()  # for another platform
    names = {name.lower().replace("_", "-")}
    for text in found.requires or ():
        requirement = Requirement(text)
        wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(requirement.marker.evaluate(context) for context in wanted):
            names |= closure(requirement.name, frozenset(requirement.extras), seen)
    return names


def size(names: set[str]) -> int:
    """Bytes of the installed files."""
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


@click.command()
@click.argument("bundle", type=click.Path(exists=True))
@click.argument("image", type=click.Path(exists=True))
def main(bundle: str, image: str) -> None:
    """Print installed sizes and cold starts."""
    for extras in ((), ("serve",), ("train",), ("train", "serve")):
        names = closure("patchcore-plugin", frozenset(extras))
        torch = "with" if "torch" in names else "without"
        title = " and ".join(extras) or "base"
        click.echo(f"{title:<16} {len(names):>4} packages {size(names) / 2**20:>7,.0f} MiB, {torch} torch")
    with tempfile.TemporaryDirectory() as cache:
        first_answer(bundle, image, "")  # the files come from disk once
        plain = sorted(first_answer(bundle, image, "") for _ in range(5))[2]
        filled = first_answer(bundle, image, cache)
        cached = sorted(first_answer(bundle, image, cache) for _ in range(5))[2]
    click.echo(f"process start to first answer: {plain:.2f} s, with the compiled network kept {cached:.2f} s")
    click.echo(f"(and {filled:.2f} s where it is compiled and kept)")


if __name__ == "__main__":
    main()
