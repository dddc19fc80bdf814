"""Our coreset sampler against anomalib's, on the patch embeddings of ELPV's training images, in one run.

    python tests/benchmarks/coreset.py --ratio 0.01 --ratio 0.1

anomalib's ``KCenterGreedy`` is timed over some steps and extrapolated: its steps cost the same from first to last.
"""

from __future__ import annotations

import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import click
import torch
from anomalib.data.utils import read_image
from anomalib.models.components import KCenterGreedy
from rich.progress import track

from patchcore_plugin import FaissPatchcore
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.elpv import lay_out


def embeddings() -> torch.Tensor:
    """Patch embeddings (420864, 152) of the demo's 411 training images."""
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=["blocks.2", "blocks.4"])
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        parts = []
        for path in track(sorted(Path(folder, "train/good").iterdir()), description="Embed"):
            image = model.pre_processor.transform(read_image(path, as_tensor=True)[None])
            parts.append(model.model.embed(image).reshape(-1, 152))
    return torch.cat(parts)


@click.command()
@click.option("--ratio", "ratios", type=float, multiple=True, default=[0.01], show_default=True, help="May be repeated.")
@click.option("--peer-steps", default=30, show_default=True, help="Steps of anomalib's sampler to time.")
def main(ratios: tuple[float, ...], peer_steps: int) -> None:
    """Print the time of both samplers and its ratio."""
    points = embeddings()
    versions = ", ".join(f"{name} {version(name)}" for name in ("patchcore-plugin", "anomalib", "torch"))
    click.echo(f"{versions}; {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    click.echo(f"embeddings {tuple(points.shape)}, float32")

    peer = KCenterGreedy(embedding=points, sampling_ratio=1.0)
    peer.coreset_size = 2
    started = time.perf_counter()
    peer.select_coreset_idxs()
    first = time.perf_counter() - started  # projection and two picks
    peer.coreset_size = peer_steps + 2
    started = time.perf_counter()
    peer.select_coreset_idxs()
    step = (time.perf_counter() - started - first) / peer_steps
    click.echo(f"anomalib: {first:.2f} s for projection and start, then {step:.3f} s a step ({peer_steps} steps timed)")

    for ratio in ratios:
        sampler = GreedyCoreset(ratio=ratio)
        started = time.perf_counter()
        picks = sampler.fit(points)
        ours = time.perf_counter() - started
        theirs = first + step * len(picks)
        click.echo(
            f"{ratio:.1%}: {len(picks)} centres, ours {ours:.1f} s, anomalib {theirs:.0f} s (extrapolated): "
            f"{theirs / ours:.0f} times faster; covering radius {sampler.radius_:.4g}"
        )


if __name__ == "__main__":
    main()
