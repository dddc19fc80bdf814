"""Does an ensemble pay? The three packaged backbones singly and together, and one of them with a bank for each layer.

    python tests/benchmarks/ensemble.py                     # ELPV's monocrystalline and polycrystalline cells
    python tests/benchmarks/ensemble.py --data MTD_FOLDER   # a folder with train/good, test/good, test/DEFECT, ground_truth
    python tests/benchmarks/ensemble.py --cost              # time for an image, and size of the bundle

256 x 256 pixels, 1 %, best settings. Each seed draws ELPV's split and the first patch of each coreset. Every image is
embedded once by each backbone, in float16; banks, weights and scores are those of the runtime, with exact search. The two
banks of "a bank per layer" have as many vectors each as the single one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from anomalib.data.utils import read_mask
from common import LAYERS, heading
from helpers.training import folder_datamodule, make_engine
from rich.progress import track
from sklearn.metrics import roc_auc_score

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.cleaning import DEFAULT_ARGUMENTS
from patchcore_plugin.coreset import GreedyCoreset
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.evaluation.metrics import pixel_metrics
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import find_images, read_image
from patchcore_plugin.memory_bank import MemoryBank, join_banks
from patchcore_plugin.model.embedder import Embedder
from patchcore_plugin.model.torch_model import spread
from patchcore_plugin.scoring import ScoreRule, anomaly_map

BACKBONES = {f"Lite{number}": f"efficientnet_lite{number}" for number in range(3)}
MODELS = {
    "Lite0": ["Lite0"],
    "Lite1": ["Lite1"],
    "Lite2": ["Lite2"],
    "Lite0 + 1 + 2": ["Lite0", "Lite1", "Lite2"],
    "Lite0, a bank per layer": ["Lite0, first layer", "Lite0, second layer"],
}
RULE = ScoreRule(score_smoothing=1)
FIRST_LAYER = 40
MANY = 1000  # images, about, that a backbone embeds
"""Values of an embedding that come from the first layer."""


class Parts:
    """Embeddings of images by each backbone, each computed once.

    Args:
        by_name: Whether images of one name are the same image, in whatever folder, as those of ELPV's splits are.
    """

    def __init__(self, *, by_name: bool) -> None:
        self._by_name = by_name
        self._embedders = {
            name: Embedder({**DEFAULT_ARGUMENTS, "backbone": backbone}, MANY) for name, backbone in BACKBONES.items()
        }
        self._held: dict[tuple[str, str], torch.Tensor] = {}

    def embed(self, name: str, paths: list[Path]) -> torch.Tensor:
        """Embeddings (N, h, w, D), float16, of images."""
        backbone, _, layer = name.partition(", ")
        keys = [(backbone, path.name if self._by_name else str(path)) for path in paths]
        missing = {key: path for key, path in zip(keys, paths, strict=True) if key not in self._held}
        stream = self._embedders[backbone].stream(list(missing.values()))
        for key, embedding in zip(missing, track(stream, backbone, len(missing), transient=True), strict=True):
            self._held[key] = embedding.half()
        part = {"": slice(None), "first layer": slice(FIRST_LAYER), "second layer": slice(FIRST_LAYER, None)}[layer]
        return torch.stack([self._held[key][..., part] for key in keys])


def read_masks(root: Path, paths: list[Path]) -> np.ndarray:
    """Masks (N, 256, 256) of test images."""
    masks = np.zeros((len(paths), 256, 256), bool)
    for number, path in enumerate(paths):
        found = list((root / "ground_truth" / path.parent.name).glob(f"{path.stem}*"))
        if found:
            mask = read_mask(found[0], as_tensor=True)[None, None].float()
            masks[number] = torch.nn.functional.interpolate(mask, (256, 256))[0, 0].numpy() > 0.5
    return masks


def detect(parts: Parts, root: Path, seed: int) -> dict[str, list[float]]:
    """Image AUROC of each model; with masks also pixel AUROC and AUPRO."""
    train, test = find_images(root / "train/good"), find_images(root / "test")
    labels = [path.parent.name != "good" for path in test]
    masks = read_masks(root, test) if (root / "ground_truth").exists() else None
    banks, found = {}, {}
    for model, members in MODELS.items():
        for name in members:
            if name not in banks:
                embeddings = parts.embed(name, train)
                rows = embeddings.reshape(-1, embeddings.shape[-1])
                vectors = rows[GreedyCoreset(ratio=0.01, random_state=seed, progress=False).fit(rows)].float()
                banks[name] = MemoryBank(vectors.numpy()), spread(vectors)
        own = [banks[name] for name in members]
        bank = join_banks([bank for bank, _ in own], [own[0][1] / scale for _, scale in own])
        scores, maps = [], []
        for images in zip(*(parts.embed(name, test) for name in members), strict=True):
            raw = bank.score(torch.cat(images, dim=-1)[None].float().numpy(), RULE)
            scores.append(float(raw.image[0]))
            if masks is not None:
                maps.append(anomaly_map(raw.patch, (256, 256))[0])
        found[model] = [float(roc_auc_score(labels, scores))]
        if masks is not None:
            pixels = pixel_metrics(masks, np.stack(maps))
            found[model] += [pixels["pixel_auroc"], pixels["aupro"]]
    return found


def show_cost(turns: int) -> None:
    """Print milliseconds and mebibytes of each model, trained on ELPV's monocrystalline cells."""
    further = {
        "Lite0 + 1 + 2": [{"backbone": BACKBONES["Lite1"]}, {"backbone": BACKBONES["Lite2"]}],
        "Lite0, a bank per layer": [{"backbone": BACKBONES["Lite0"], "layers": LAYERS[1:]}],
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lay_out(root)
        runtimes, sizes = {}, {}
        for number, name in enumerate(MODELS):
            fitted = FaissPatchcore(
                backbone=BACKBONES.get(name, BACKBONES["Lite0"]),
                layers=LAYERS[:1] if "layer" in name else LAYERS,
                coreset_sampling_ratio=0.01,
                score_smoothing=1,
                ensemble=further.get(name),
                visualizer=False,
            )
            make_engine(root / f"fit{number}", limit_val_batches=0).fit(fitted, datamodule=folder_datamodule(root))
            bundle = export_bundle(fitted.eval(), root / f"bundle{number}", images=find_images(root / "test/good")[:64])
            runtimes[name] = PatchcoreRuntime.load(bundle)
            sizes[name] = sum(path.stat().st_size for path in bundle.iterdir()) / 2**20
        images = [read_image(path) for path in find_images(root / "test")[:turns]]
        times = {name: [] for name in runtimes}
        for image in [images[0], *images]:
            for name, runtime in runtimes.items():
                started = time.perf_counter()
                runtime.predict([image])
                times[name].append(1000 * (time.perf_counter() - started))
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    parts, size = sum(middle[name] for name in BACKBONES), sum(sizes[name] for name in BACKBONES)
    click.echo("model | milliseconds an image | of the sum of Lite0, 1 and 2 | bundle, MiB | of the sum")
    for name in MODELS:
        shown = f"{middle[name]:.1f} | {middle[name] / parts:.2f} | {sizes[name]:.1f} | {sizes[name] / size:.2f}"
        click.echo(f"{name} | {shown}")


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--seeds", default=3, show_default=True)
@click.option("--cost", is_flag=True, help="Measure time and size instead.")
@click.option("--turns", type=click.IntRange(min=1), default=60, show_default=True, help="Images that are timed.")
def main(data: Path | None, seeds: int, cost: bool, turns: int) -> None:
    """Print image AUROC, and with masks pixel AUROC and AUPRO, of each model."""
    click.echo(heading("openvino", "faiss-cpu"))
    if cost:
        show_cost(turns)
        return
    click.echo("data | seed | " + " | ".join(MODELS))
    for kind in ["mono", "poly"] if data is None else [None]:
        parts, rows = Parts(by_name=kind is not None), []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                if kind is not None:
                    lay_out(Path(folder), kind, seed)
                rows.append(detect(parts, data or Path(folder), seed))
            shown = ["; ".join(f"{value:.4f}" for value in rows[-1][name]) for name in MODELS]
            click.echo(f"{kind or data.name} | {seed} | " + " | ".join(shown))
        means = {name: np.mean([row[name] for row in rows], axis=0) for name in MODELS}
        click.echo(
            f"{kind or data.name} | mean | " + " | ".join("; ".join(f"{v:.4f}" for v in means[name]) for name in MODELS)
        )


if __name__ == "__main__":
    main()
