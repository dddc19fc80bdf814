"""Time of our bundle against anomalib's own OpenVINO export, with the same weights and bank, on real solar cells.

    python tests/benchmarks/serving.py                  # 1 % and 10 % banks of 411 images: 4,208 and 42,086 vectors
    python tests/benchmarks/serving.py --precision auto

Both get a decoded image (300 x 300, u8), give score and map, and use all cores. anomalib's IR has a fixed batch of two
images and one image size: it gets pairs that Pillow has resized, and its time is counted per image. Ours gets one image per
call in mode latency, and pairs in mode throughput. All times are medians of single calls, after one round that is not
counted. Each runs in its own process without torch, as a service would.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import openvino as ov
from PIL import Image
from rich.console import Console
from rich.table import Table

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import read_manifest
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.images import read_image

if TYPE_CHECKING:
    import torch

ROUNDS = 3


def make_bundle(bank: torch.Tensor, normal: list[Path], folder: Path, **options: object) -> Path:
    """Export a bundle with this bank."""
    from common import LAYERS

    from patchcore_plugin import FaissPatchcore
    from patchcore_plugin.export import export_bundle

    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS, normalization="imagenet").eval()
    model.model.memory_bank = bank
    return export_bundle(model, folder, images=normal, **options)


def make_peer(bank: torch.Tensor, folder: Path) -> Path:
    """Let anomalib export its Patchcore with our backbone's weights and bank as an OpenVINO IR."""
    from anomalib.models import Patchcore
    from common import LAYERS

    from patchcore_plugin import FaissPatchcore

    weights = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS).model.feature_extractor.net.state_dict()
    model = Patchcore(backbone="tf_efficientnet_lite0", layers=LAYERS, pre_trained=False, evaluator=False)
    model.model.feature_extractor.feature_extractor.load_state_dict(weights)
    model.model.memory_bank = bank
    return model.eval().to_openvino(folder, input_size=(256, 256))


def in_own_process(function, *arguments):
    """Result of a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def pair(images: list[np.ndarray]) -> np.ndarray:
    """Two images as anomalib's IR takes them: ``(2, 3, 256, 256)``, f32, in [0, 1]."""
    resized = [Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in resized]).transpose(0, 3, 1, 2).astype(np.float32) / 255


def measured(bundle: Path, paths: list[Path]) -> tuple[float, float, list[float]]:
    """Milliseconds for an image, milliseconds of the search in it, and the scores."""
    runtime, images = PatchcoreRuntime.load(bundle), [read_image(path) for path in paths]
    whole, search = [], []
    for _ in range(ROUNDS):
        scores = []
        for image in images:
            started = time.perf_counter()
            answer = runtime.predict([image])[0]
            _ = answer.anomaly_map
            whole.append(time.perf_counter() - started)
            scores.append(answer.score)
    for image in images:
        embedding = runtime.embed([image])
        started = time.perf_counter()
        runtime.bank.score(embedding, runtime.rule)
        search.append(time.perf_counter() - started)
    return 1000 * float(np.median(whole[len(images) :])), 1000 * float(np.median(search)), scores


def measured_in_pairs(bundle: Path, paths: list[Path]) -> float:
    """Milliseconds for an image, with two images per call."""
    runtime, images = PatchcoreRuntime.load(bundle, mode="throughput"), [read_image(path) for path in paths]
    times = []
    for _ in range(ROUNDS):
        for first in range(0, len(images), 2):
            started = time.perf_counter()
            for answer in runtime.predict(images[first : first + 2]):
                _ = answer.anomaly_map
            times.append((time.perf_counter() - started) / 2)
    return 1000 * float(np.median(times[len(images) // 2 :]))


def measured_peer(path: Path, paths: list[Path]) -> tuple[float, list[float]]:
    """Milliseconds for an image of anomalib's IR, and the scores."""
    peer = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})
    images = [read_image(path) for path in paths]
    times = []
    for _ in range(ROUNDS):
        scores = []
        for first in range(0, len(images), 2):
            two = images[first : first + 2]
            started = time.perf_counter()
            found = peer([pair(two)])
            times.append((time.perf_counter() - started) / 2)
            scores += next(found[port] for port in found if "pred_score" in port.names).reshape(-1).tolist()
    return 1000 * float(np.median(times[len(images) // 2 :])), scores


@click.command()
@click.option("--ratio", "ratios", type=float, multiple=True, default=[0.01, 0.1], show_default=True)
@click.option("--precision", type=click.Choice(["f32", "auto"]), default="f32", show_default=True)
@click.option("--images", "count", default=100, show_default=True, help="Test images; half of them are defective.")
def main(ratios: tuple[float, ...], precision: str, count: int) -> None:
    """Print the milliseconds for an image of both, their ratio, and the correlation of their scores (r)."""
    from common import elpv_embeddings, heading

    from patchcore_plugin.coreset import GreedyCoreset

    click.echo(heading("openvino", "faiss-cpu"))
    embeddings = elpv_embeddings()
    table = Table("bank", "index", "precision", "ours ms", "search in it", "pairs", "anomalib ms", "ratio", "of pairs", "r")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_out(folder / "elpv")
        good, bad = (sorted((folder / "elpv/test" / kind).iterdir()) for kind in ("good", "defective"))
        images = good[32 : 32 + count // 2] + bad[: count // 2]
        for ratio in ratios:
            bank = embeddings[GreedyCoreset(ratio=ratio).fit(embeddings)]
            bundle = make_bundle(bank, good[:32], folder / f"bundle{ratio}", precision=precision)
            peer = make_peer(bank, folder / f"peer{ratio}")
            mine, search, scores = in_own_process(measured, bundle, images)
            pairs = in_own_process(measured_in_pairs, bundle, images)
            theirs, expected = in_own_process(measured_peer, peer, images)
            correlation = np.corrcoef(scores, expected)[0, 1]
            manifest = read_manifest(bundle)
            index = manifest.index
            table.add_row(
                f"{len(bank):,} x {bank.shape[1]}", f"{index.kind} {index.width or ''}", manifest.precision,
                f"{mine:.1f}", f"{search:.1f}", f"{pairs:.1f}", f"{theirs:.1f}", f"{theirs / mine:.1f}",
                f"{theirs / pairs:.1f}", f"{correlation:.4f}",
            )  # fmt: skip
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
