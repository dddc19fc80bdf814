"""Our bundle against anomalib's own OpenVINO export, from the same weights and the same bank, on real solar cells.

    python tests/benchmarks/serving.py                  # 1 % and 10 % banks of 411 images: 4,208 and 42,086 vectors
    python tests/benchmarks/serving.py --precision auto

Both go from a decoded image (300 x 300, u8) to score and map, with all cores. anomalib's IR is called with two images at a
time, which its batch is frozen at, and counted per image; it is given images that Pillow resized, as the graph takes one
size only. The medians are of single calls, after one round that is not counted; the two work one after the other, as each
would alone on a machine.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import openvino as ov
import torch
from anomalib.models import Patchcore
from common import LAYERS, elpv_embeddings, heading
from PIL import Image
from rich.console import Console
from rich.table import Table

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import read_image

ROUNDS = 3


def ours(bank: torch.Tensor, normal: list[Path], folder: Path, **options: object) -> PatchcoreRuntime:
    model = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS).eval()
    model.model.memory_bank = bank
    return PatchcoreRuntime.load(export_bundle(model, folder, images=normal, **options))


def anomalib(bank: torch.Tensor, folder: Path) -> ov.CompiledModel:
    """anomalib's Patchcore with our backbone's weights and bank, as it exports itself."""
    weights = FaissPatchcore(backbone="efficientnet_lite0", layers=LAYERS).model.feature_extractor.net.state_dict()
    model = Patchcore(backbone="tf_efficientnet_lite0", layers=LAYERS, pre_trained=False, evaluator=False)
    model.model.feature_extractor.feature_extractor.load_state_dict(weights)
    model.model.memory_bank = bank
    path = model.eval().to_openvino(folder, input_size=(256, 256))
    return ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})


def pair(images: list[np.ndarray]) -> np.ndarray:
    """Two images as anomalib's IR takes them: resized, in [0, 1], (2, 3, 256, 256)."""
    resized = [Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in resized]).transpose(0, 3, 1, 2).astype(np.float32) / 255


def measured(runtime: PatchcoreRuntime, images: list[np.ndarray]) -> tuple[float, float, list[float]]:
    """Milliseconds an image, those of them that the search takes, and scores."""
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


def measured_peer(peer: ov.CompiledModel, images: list[np.ndarray]) -> tuple[float, list[float]]:
    """Milliseconds an image, and scores."""
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
    """Print milliseconds an image of both, and their ratio."""
    click.echo(heading("openvino", "faiss-cpu"))
    embeddings = elpv_embeddings()
    table = Table("bank", "index", "precision", "ours ms", "of it search", "anomalib ms", "ratio", "score correlation")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_out(folder / "elpv")
        good, bad = (sorted((folder / "elpv/test" / kind).iterdir()) for kind in ("good", "defective"))
        images = [read_image(path) for path in good[32 : 32 + count // 2] + bad[: count // 2]]
        for ratio in ratios:
            bank = embeddings[GreedyCoreset(ratio=ratio).fit(embeddings)]
            runtime = ours(bank, good[:32], folder / f"bundle{ratio}", precision=precision)

            peer = anomalib(bank, folder / f"peer{ratio}")
            mine, search, scores = measured(runtime, images)
            theirs, expected = measured_peer(peer, images)
            correlation = np.corrcoef(scores, expected)[0, 1]
            index = runtime.manifest.index
            table.add_row(
                f"{len(bank):,} x {bank.shape[1]}", f"{index.kind} {index.width or ''}", runtime.manifest.precision,
                f"{mine:.1f}", f"{search:.1f}", f"{theirs:.1f}", f"{theirs / mine:.1f}", f"{correlation:.6f}",
            )  # fmt: skip
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
