"""The tests with the oldest packages that pyproject.toml allows, or with the newest: a table of versions and results.

    python tests/benchmarks/versions.py --extra serve --bounds lowest --bounds newest --python 3.10 --python 3.13

The oldest of `serve` are the lowest versions that have wheels for the Python. Each run makes a virtual environment: of
0.5 GiB for `serve`, of 7 GiB for `test`, which runs all tests. Where an index has a torch without CUDA, `--pin
torch==2.13.0+cpu` takes it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

sys.path.append(str(Path(__file__).parents[1]))
from helpers.packages import ResolutionError, uv
from helpers.training import ROOT

PACKAGES = ("anomalib", "torch", "openvino", "faiss-cpu", "bentoml", "pydantic", "pillow", "numpy")
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "httpx>=0.27", "scipy>=1.15")
WITHOUT_TORCH = (
    *("bank", "bank_file", "bfloat16", "conformal", "drift", "image_checks", "indexes", "names", "network", "network_cache"),
    *("old_bundles", "regions", "settings", "windows"),
)
"""Files of unit tests that need the extra serve alone."""


def try_out(extra: str, bounds: str, python: str, pins: tuple[str, ...], tests: tuple[str, ...], folder: Path) -> str:
    """Install an extra in a new virtual environment, and run tests there; returns the table's row."""
    interpreter = str(folder / "bin" / "python")
    resolution = {"lowest": "lowest-direct", "newest": "highest"}[bounds]
    title = f"`{extra}`, {bounds}, Python {re.sub(r'.*/(?=3)|/bin.*', '', python)}"
    try:
        uv("venv", "--quiet", "--python", python, str(folder))
        options = ("--quiet", "--python", interpreter)
        wheels = ("--only-binary", ":all:") if extra == "serve" else ()  # anomalib needs FrEIA, which has none
        wanted = ("pyproject.toml", "-", "--extra", extra, "--resolution", resolution, *wheels)
        locked = uv("pip", "compile", *options, *wanted, "--no-header", text="\n".join(pins))
        uv("pip", "install", *options, "--requirement", "-", text=locked)
        uv("pip", "install", *options, "--no-deps", "--editable", ".")
        uv("pip", "install", *options, *TOOLS)
    except ResolutionError as error:
        return f"| {title} |{' |' * len(PACKAGES)} cannot be installed: {str(error).splitlines()[-1]} |"
    listed = dict(re.findall(r"^(\S+)==(\S+)", uv("pip", "freeze", "--python", interpreter), re.MULTILINE))
    chosen = tests or (("tests",) if extra == "test" else tuple(f"tests/unit/test_{name}.py" for name in WITHOUT_TORCH))
    command = [interpreter, "-m", "pytest", "-q", "-n0", "-m", "not slow", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    *lines, last = done.stdout.splitlines() or [done.stderr]
    click.echo("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), err=True)
    versions = " | ".join(listed.get(name, "") for name in PACKAGES)
    return f"| {title} | {versions} | {re.sub(r' in .*', '', last).strip('= ')} |"


@click.command()
@click.argument("tests", nargs=-1)
@click.option("--extra", type=click.Choice(["serve", "test"]), default="serve", show_default=True)
@click.option("--bounds", type=click.Choice(["lowest", "newest"]), multiple=True, default=["lowest"], show_default=True)
@click.option("--python", "pythons", multiple=True, default=[f"3.{sys.version_info.minor}"], show_default=True)
@click.option("--pin", "pins", multiple=True, help="A further requirement, such as torch==2.13.0+cpu.")
def main(
    tests: tuple[str, ...], extra: str, bounds: tuple[str, ...], pythons: tuple[str, ...], pins: tuple[str, ...]
) -> None:
    """Print a row for each set of bounds and Python; TESTS are files of tests, or what pytest takes instead."""
    click.echo(f"| installed | {' | '.join(PACKAGES)} | tests |\n{'|---' * (2 + len(PACKAGES))}|")
    for bound in bounds:
        for python in pythons:
            with tempfile.TemporaryDirectory(prefix="versions-") as folder:
                click.echo(try_out(extra, bound, python, pins, tests, Path(folder, "venv")))


if __name__ == "__main__":
    main()
