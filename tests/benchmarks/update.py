"""Gain and cost of ``patchcore update``: false alarms after a change of the images, before and after the update.

    python tests/benchmarks/update.py

The script trains at 1 % on ELPV's monocrystalline cells through anomalib's Engine. It makes 50 of the normal test images
brighter or blurred, and gives them to the update as new normal images. The update never sees the other normal test images,
which are changed in the same way. For comparison, a full training runs with the 50 images added to the old ones.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click
from anomalib.data import Folder
from anomalib.engine import Engine
from common import LAYERS, heading
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.elpv import lay_out
from patchcore_plugin.export import export_bundle
from patchcore_plugin.operations.update import update_bundle

NEW = 50
SHIFTS = {
    "30 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "60 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.6),
    "blurred by 2 pixels": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "brighter and blurred": lambda image: ImageEnhance.Brightness(image.filter(ImageFilter.GaussianBlur(1.5))).enhance(1.4),
}


def train(root: Path, folder: Path) -> Path:
    """Train at 1 %; returns the bundle."""
    model = FaissPatchcore(
        backbone="efficientnet_lite0",
        layers=LAYERS,
        normalization="imagenet",
        coreset_sampling_ratio=0.01,
        visualizer=False,
        evaluator=False,
    )
    data = Folder(
        name="cells", root=root, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/defective",
        num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip
    Engine(default_root_dir=folder / "results", accelerator="cpu", devices=1, logger=False).fit(model, datamodule=data)
    return export_bundle(model.eval(), folder / "bundle")


def change(images: list[Path], folder: Path, shift: str) -> list[Path]:
    folder.mkdir()
    for image in images:
        SHIFTS[shift](Image.open(image).convert("L")).save(folder / image.name)
    return sorted(folder.iterdir())


@click.command()
@click.option("--retrain/--no-retrain", default=True, show_default=True, help="Also measure a full training.")
def main(retrain: bool) -> None:
    """Print false alarms and AUROC before and after each update, and the times."""
    click.echo(heading("openvino", "faiss-cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder, root = Path(temporary), Path(temporary, "elpv")
        lay_out(root)
        good, bad = (sorted((root / "test" / kind).iterdir()) for kind in ("good", "defective"))
        new = good[:: len(good) // NEW][:NEW]
        rest = [image for image in good if image not in new]
        bundle = train(root, folder)
        old = PatchcoreRuntime.load(bundle)
        before = dict(zip([*good, *bad], old.predict([*good, *bad]), strict=True))
        alarms = [sum(before[image].verdict == "anomalous" for image in part) for part in (new, rest)]
        click.echo(
            f"bank {len(old.bank):,}, radius {old.manifest.covering_radius:.4g}, threshold "
            f"{old.manifest.image.threshold:.4g}; false alarms before any change: {alarms[0]} of the {NEW}, "
            f"{alarms[1]} of the {len(rest)} others"
        )

        def auroc(answers: dict[Path, object], normal: list[Path]) -> float:
            return roc_auc_score([0] * len(normal) + [1] * len(bad), [answers[image].score for image in [*normal, *bad]])

        table = Table(
            "shift", f"false alarms of the {NEW}", "of those held out", f"of {len(rest)} others", "vectors",
            "AUROC, old test set", f"without the {NEW}", "s",
        )  # fmt: skip
        for number, shift in enumerate(SHIFTS):
            given, unseen = change(new, folder / f"new{number}", shift), change(rest, folder / f"rest{number}", shift)
            started = time.perf_counter()
            report = update_bundle(bundle, given, folder / f"updated{number}")
            spent = time.perf_counter() - started
            updated = PatchcoreRuntime.load(folder / f"updated{number}")
            alarms = report.count("anomalous")
            counts = [
                [sum(answer.verdict == "anomalous" for answer in runtime.stream(images)) for runtime in (old, updated)]
                for images in (given, unseen)
            ]
            after = dict(zip(before, updated.predict(before), strict=True))
            areas = [(auroc(before, normal), auroc(after, normal)) for normal in (good, rest)]
            table.add_row(
                shift, _change(counts[0]), _change(alarms), _change(counts[1]), f"+{report.update.vectors:,}",
                *(f"{one:.4f} {other - one:+.4f}" for one, other in areas), f"{spent:.1f}",
            )  # fmt: skip
        Console(width=125).print(table)
        if retrain:
            for image in given:
                shutil.copy(image, root / "train/good" / f"new-{image.name}")
            (folder / "again").mkdir()
            started = time.perf_counter()
            train(root, folder / "again")
            click.echo(f"training again with the {NEW} images, and its export: {time.perf_counter() - started:.1f} s")


def _change(counts: tuple[int, int]) -> str:
    before, after = counts
    return f"{before} to {after}" + (f" ({after / before - 1:+.0%})" if before else "")


if __name__ == "__main__":
    main()
