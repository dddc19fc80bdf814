"""Our bundle against anomalib's own OpenVINO export, from the same weights and the same bank, on real solar cells.

    python tests/benchmarks/serving.py                  # 1 % and 10 % banks of 411 images: 4,208 and 42,086 vectors
    python tests/benchmarks/serving.py --precision auto

Both go from a decoded image (300 x 300, u8) to score and map, with all cores. anomalib's IR is called with two images at a
time, which its batch is frozen at, and counted per image; it is given images that Pillow resized, as the graph takes one
size only. Ours is called with one image, in mode latency, and with two at a time like the peer, in mode throughput. The
medians are of single calls, after one round that is not counted; each works alone, in a process of its own without torch,
as it would serve.
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


def ours(bank: torch.Tensor, normal: list[Path], folder: Path, **options: object) -> Path:
    """The bundle of a bank."""
    from common import LAYERS

    from patchcore_plugin import FaissPatchcore
    from patchcore_plugin.export import export_bundle

    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS).eval()
    model.model.memory_bank = bank
    return export_bundle(model, folder, images=normal, **options)


def anomalib(bank: torch.Tensor, folder: Path) -> Path:
    """The IR of anomalib's Patchcore with our backbone's weights and bank, as it exports itself."""
    from anomalib.models import Patchcore
    from common import LAYERS

    from patchcore_plugin import FaissPatchcore

    weights = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS).model.feature_extractor.net.state_dict()
    model = Patchcore(backbone="tf_efficientnet_lite0", layers=LAYERS, pre_trained=False, evaluator=False)
    model.model.feature_extractor.feature_extractor.load_state_dict(weights)
    model.model.memory_bank = bank
    return model.eval().to_openvino(folder, input_size=(256, 256))


def alone(function, *arguments):
    """What a function gives in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def pair(images: list[np.ndarray]) -> np.ndarray:
    """Two images as anomalib's IR takes them: resized, in [0, 1], (2, 3, 256, 256)."""
    resized = [Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in resized]).transpose(0, 3, 1, 2).astype(np.float32) / 255


def measured(bundle: Path, paths: list[Path]) -> tuple[float, float, list[float]]:
    """Milliseconds an image, those of them that the search takes, and scores."""
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
        runtime.bank.score(embedding, 9)
        search.append(time.perf_counter() - started)
    return 1000 * float(np.median(whole[len(images) :])), 1000 * float(np.median(search)), scores


def measured_in_pairs(bundle: Path, paths: list[Path]) -> float:
    """Milliseconds an image, where two are given at a time."""
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
    """Milliseconds an image, and scores."""
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
@click.option("--images", "count", default=100, show_default=True, help="Test images, half of them defective.")
def main(ratios: tuple[float, ...], precision: str, count: int) -> None:
    """Print milliseconds an image of both, their ratio, and how their scores correlate (r)."""
    from common import elpv_embeddings, heading

    from patchcore_plugin.coreset import GreedyCoreset

    click.echo(heading("openvino", "faiss-cpu"))
    embeddings = elpv_embeddings()
    table = Table("bank", "index", "precision", "ours ms", "of it search", "by twos", "anomalib ms", "ratio", "of twos", "r")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_out(folder / "elpv")
        good, bad = (sorted((folder / "elpv/test" / kind).iterdir()) for kind in ("good", "defective"))
        images = good[32 : 32 + count // 2] + bad[: count // 2]
        for ratio in ratios:
            bank = embeddings[GreedyCoreset(ratio=ratio).fit(embeddings)]
            bundle = ours(bank, good[:32], folder / f"bundle{ratio}", precision=precision)
            peer = anomalib(bank, folder / f"peer{ratio}")
            mine, search, scores = alone(measured, bundle, images)
            twos = alone(measured_in_pairs, bundle, images)
            theirs, expected = alone(measured_peer, peer, images)
            correlation = np.corrcoef(scores, expected)[0, 1]
            manifest = read_manifest(bundle)
            index = manifest.index
            table.add_row(
                f"{len(bank):,} x {bank.shape[1]}", f"{index.kind} {index.width or ''}", manifest.precision,
                f"{mine:.1f}", f"{search:.1f}", f"{twos:.1f}", f"{theirs:.1f}", f"{theirs / mine:.1f}",
                f"{theirs / twos:.1f}", f"{correlation:.4f}",
            )  # fmt: skip
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
