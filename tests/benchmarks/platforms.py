"""What `pip install patchcore-plugin[serve]` installs on each platform and Python: a table of numbers of packages.

    python tests/benchmarks/platforms.py

uv resolves the requirements, from wheels alone. Nothing is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.append(str(Path(__file__).parents[1]))
from helpers.packages import PLATFORMS, PYTHONS, ResolutionError, resolve


@click.command()
@click.option("--extra", default="serve", show_default=True, help="The extra to install.")
def main(extra: str) -> None:
    """Print a row for each platform."""
    click.echo(f"| `{extra}`, packages | {' | '.join(f'Python {python}' for python in PYTHONS)} |")
    click.echo("|---" * (1 + len(PYTHONS)) + "|")
    reasons = []
    for name, platform in PLATFORMS.items():
        cells = []
        for python in PYTHONS:
            try:
                versions = resolve(extra, platform, python)
            except ResolutionError as error:
                reasons.append(f"{name}, Python {python}: {error}")
                cells.append("none")
                continue
            cells.append(f"{len(versions)}, {'with' if 'torch' in versions else 'without'} torch")
        click.echo(f"| {name} | {' | '.join(cells)} |")
    click.echo("\n".join(reasons))


if __name__ == "__main__":
    main()
