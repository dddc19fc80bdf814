"""Data and headings that the benchmarks share."""

from __future__ import annotations

import os
import platform
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from anomalib.data.utils import read_image
from rich.progress import track

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.distances import product_type
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import find_images

LAYERS = ["blocks.2", "blocks.4"]


def heading(*packages: str, columns: int = 152) -> str:
    """Versions and machine, in one line."""
    names = ("patchcore-plugin", "anomalib", "torch", *packages)
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    product = str(product_type(torch.device("cpu"), columns, torch.get_num_threads())).removeprefix("torch.")
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, {product} products"
    return f"{versions}; {machine}"


def elpv_embeddings(images: int | None = None) -> torch.Tensor:
    """Patch embeddings of solar cells, 1,024 x 152 an image.

    Args:
        images: How many: of the demo's 411 training images by default, of all 2,624 cells where more are asked for.
    """
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        paths = sorted(Path(folder, "train/good").iterdir())
        if images is not None and images > len(paths):
            import elpv_dataset

            paths = sorted(Path(elpv_dataset.__file__).parent.rglob("*.png"))
        return embed(model, paths[:images])


def embed(model: FaissPatchcore, paths: list[Path]) -> torch.Tensor:
    """Patch embeddings of images, 1,024 x 152 each."""
    embeddings = torch.empty(len(paths) * 1024, 152)
    for i, path in enumerate(track(paths, description="Embed")):
        image = model.pre_processor.transform(read_image(path, as_tensor=True)[None])
        embeddings[i * 1024 : (i + 1) * 1024] = model.model.embed(image).reshape(-1, 152)
    return embeddings


def nominal_halves(data: Path | None, folder: Path) -> tuple[PatchcoreRuntime, list[Path], list[Path]]:
    """A bank of half of the normal images, at 1 %.

    Args:
        data: Folder with train/good, test/good and test/<defect>; ELPV's monocrystalline cells if not given.
        folder: For what is made.

    Returns:
        The runtime, the other half of the normal images, and the defective images.
    """
    if data is None:
        data = folder / "elpv"
        lay_out(data)
    images = [path for part in ("train", "test") for path in find_images(data / part)]
    normal = [path for path in images if path.parent.name == "good"]
    defective = [path for path in images if path.parent.name != "good"]
    random.Random(0).shuffle(normal)
    half = len(normal) // 2
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS).eval()
    embeddings = embed(model, normal[:half])
    model.model.memory_bank = embeddings[GreedyCoreset(ratio=0.01).fit(embeddings)]
    runtime = PatchcoreRuntime.load(export_bundle(model, folder / "bundle", images=normal[half:][:64]))
    return runtime, normal[half:], defective


def clustered(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random rows like patch embeddings: 200 kinds of texture, each varying in 24 directions, and some noise."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(200, columns)).astype(np.float32)
    directions = (rng.normal(size=(200, 24, columns)) / 5).astype(np.float32)
    embeddings = torch.empty(rows, columns)
    for kind, part in enumerate(np.array_split(rng.permutation(rows), 200)):
        varied = centres[kind] + rng.normal(size=(len(part), 24)).astype(np.float32) @ directions[kind]
        embeddings[part] = torch.from_numpy(varied + 0.1 * rng.normal(size=varied.shape).astype(np.float32))
    return embeddings
