"""Write the files of earlier versions that tests/helpers/old_files.py names. Run this with the earlier code:

    git worktree add /tmp/old 5a87ed5 && PYTHONPATH=/tmp/old python tests/helpers/make_old_files.py tests/data/old
    git worktree add /tmp/older 7b5e6ff && PYTHONPATH=/tmp/older python tests/helpers/make_old_files.py tests/data/old

5a87ed5 is the last version with ``position_weight``, and with everything in one folder; it writes bundles of format 3.
7b5e6ff is the last version that writes bundles of format 2. Each version also writes the scores that it gives itself.

The network is tiny and has random weights, which a seed fixes: the files hold what every version calls a model, and stay
small. Images are solar cells of the package elpv-dataset, made small.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from PIL import Image

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import FORMAT_VERSION, read_manifest
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle

SIDE = 64  # pixels of an image
COUNTS = {"train/good": 12, "test/good": 4, "test/defective": 4}


def make_images(root: Path, folder: Path) -> None:
    """Small cells in ``root`` for a training, and those that every version scores in ``folder``."""
    lay_out(root / "elpv")
    for kind, count in COUNTS.items():
        (root / kind).mkdir(parents=True)
        for path in sorted((root / "elpv" / kind).iterdir())[:count]:
            with Image.open(path) as image:
                image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX).save(root / kind / path.name)
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*sorted((root / "test/good").iterdir())[:1], *sorted((root / "test/defective").iterdir())[:2]]:
        shutil.copy(path, folder / path.name)


def train(root: Path, **arguments: object) -> tuple[FaissPatchcore, Path]:
    """Train a tiny model; returns it and its checkpoint."""
    torch.manual_seed(0)
    if "image_size" in inspect.signature(FaissPatchcore).parameters:
        arguments["image_size"] = [SIDE, SIDE]
    else:  # before there was such an argument
        arguments["pre_processor"] = FaissPatchcore.configure_pre_processor((SIDE, SIDE))
    model = FaissPatchcore(
        backbone="test_resnet",
        layers=["act1", "layer1"],
        pre_trained=False,
        coreset_sampling_ratio=0.02,
        visualizer=False,
        **arguments,
    )
    data = Folder(
        name="cells", root=root, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/defective",
        val_split_mode="same_as_test", num_workers=0,
    )  # fmt: skip
    engine = Engine(default_root_dir=root / "results", accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.train(model=model, datamodule=data)
    return model.eval(), Path(engine.best_model_path)


def scores_of_model(model: FaissPatchcore, images: list[Path]) -> dict[str, list[float]]:
    """Image scores by torch."""
    batch = torch.stack([read_image(path, as_tensor=True) for path in images])
    with torch.no_grad():
        raw, normalized = model.model(model.pre_processor(batch)).pred_score, model(batch).pred_score
    return {"raw": raw.flatten().tolist(), "normalized": normalized.flatten().tolist()}


def scores_of_bundle(bundle: Path, images: list[Path]) -> dict[str, list[float]]:
    """Image scores by the runtime."""
    predictions = PatchcoreRuntime(bundle, cache=False).predict(images)
    return {
        "raw": [prediction.score for prediction in predictions],
        "normalized": [prediction.normalized_score for prediction in predictions],
    }


def write_format_2(root: Path, out: Path, images: list[Path]) -> dict[str, dict[str, list[float]]]:
    """What 7b5e6ff writes."""
    model, _ = train(root)
    export_bundle(model, out / "bundle-format-2", "cells", index="flat", overwrite=True)
    return {"bundle-format-2": scores_of_bundle(out / "bundle-format-2", images)}


def write_format_3(root: Path, out: Path, images: list[Path]) -> dict[str, dict[str, list[float]]]:
    """What 5a87ed5 writes: checkpoints, a torch export, and bundles."""
    from patchcore_plugin import ConformalPostProcessor

    expected = {}
    model, checkpoint = train(root, post_processor=ConformalPostProcessor(0.2), score_smoothing=1)
    shutil.copy(checkpoint, out / "model.ckpt")
    exported = Engine(logger=False).export(model, "torch", export_root=root / "export")
    shutil.copy(exported, out / "model.pt")
    expected["model.ckpt"] = expected["model.pt"] = scores_of_model(model, images)
    for index in ("flat", "hnsw"):
        name = "bundle-bfloat16" if index == "flat" else f"bundle-{index}"
        export_bundle(model, out / name, "cells", index=index, overwrite=True)
        if index == "flat":  # by hand: whether a measurement takes this search, and at what width, hangs on the machine
            manifest = read_manifest(out / name)
            manifest = manifest.model_copy(update={"index": manifest.index.model_copy(update={"width": 2})})
            (out / name / "manifest.json").write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        expected[name] = scores_of_bundle(out / name, images)
    placed, checkpoint = train(root, position_weight=10.0)
    shutil.copy(checkpoint, out / "position_weight.ckpt")
    expected["position_weight.ckpt"] = scores_of_model(placed, images)
    return expected


def main(out: Path) -> None:
    """Write the files of the version that is imported."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root, out / "images")
        images = sorted((out / "images").iterdir())
        expected = (write_format_2 if FORMAT_VERSION == 2 else write_format_3)(root, out, images)
    file = out / "expected.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**before, **expected}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
