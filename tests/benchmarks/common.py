"""Data and the heading line that the benchmarks share."""

from __future__ import annotations

import os
import platform
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from anomalib.data.utils import read_image
from rich.progress import track

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.coreset.products import faster_dtype
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import find_images

sys.path.append(str(Path(__file__).parents[1]))  # for tests/helpers
LAYERS = ["blocks.2", "blocks.4"]


def heading(*packages: str, columns: int = 152) -> str:
    """One line with the versions of packages and the machine.

    Args:
        packages: Names of packages to show besides patchcore-plugin, anomalib and torch.
        columns: Length of the embeddings, which decides the number format of the sampler's products.
    """
    names = ("patchcore-plugin", "anomalib", "torch", *packages)
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    product = str(faster_dtype(torch.device("cpu"), columns, torch.get_num_threads())).removeprefix("torch.")
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, {product} products"
    return f"{versions}; {machine}"


def elpv_embeddings(images: int | None = None) -> torch.Tensor:
    """Embed solar cells: 1,024 patches of 152 values for each image.

    Args:
        images: Number of images; by default the demo's 411 training images. More than 411 are taken from all 2,624 cells.
    """
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS, normalization="imagenet")
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        paths = sorted(Path(folder, "train/good").iterdir())
        if images is not None and images > len(paths):
            import elpv_dataset

            paths = sorted(Path(elpv_dataset.__file__).parent.rglob("*.png"))
        return embed(model, paths[:images])


def embed(model: FaissPatchcore, paths: list[Path]) -> torch.Tensor:
    """Embed images: 1,024 patches of 152 values for each."""
    embeddings = torch.empty(len(paths) * 1024, 152)
    for i, path in enumerate(track(paths, description="Embed")):
        image = model.pre_processor.transform(read_image(path, as_tensor=True)[None])
        embeddings[i * 1024 : (i + 1) * 1024] = model.model.embed(image).reshape(-1, 152)
    return embeddings


def nominal_halves(data: Path | None, folder: Path) -> tuple[PatchcoreRuntime, list[Path], list[Path]]:
    """Make a bundle of half of the normal images, with a coreset of 1 %.

    Args:
        data: Folder with train/good, test/good and test/DEFECT; None takes ELPV's monocrystalline cells.
        folder: Folder for the bundle, and for the cells.

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
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS, normalization="imagenet").eval()
    embeddings = embed(model, normal[:half])
    model.model.memory_bank = embeddings[GreedyCoreset(ratio=0.01).fit(embeddings)]
    runtime = PatchcoreRuntime.load(export_bundle(model, folder / "bundle", images=normal[half:][:64]))
    return runtime, normal[half:], defective


def clustered(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Draw random rows that resemble patch embeddings: 200 textures, each varying in 24 directions, and some noise."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(200, columns)).astype(np.float32)
    directions = (rng.normal(size=(200, 24, columns)) / 5).astype(np.float32)
    embeddings = torch.empty(rows, columns)
    for kind, part in enumerate(np.array_split(rng.permutation(rows), 200)):
        varied = centers[kind] + rng.normal(size=(len(part), 24)).astype(np.float32) @ directions[kind]
        embeddings[part] = torch.from_numpy(varied + 0.1 * rng.normal(size=varied.shape).astype(np.float32))
    return embeddings
