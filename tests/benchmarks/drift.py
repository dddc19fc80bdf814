"""How soon is drift detected, and how often falsely? Real images, some of them changed, scored by the runtime.

    python tests/benchmarks/drift.py                      # ELPV's monocrystalline cells
    python tests/benchmarks/drift.py --data MTD_FOLDER    # a folder with train/good, test/good and test/DEFECT

The bank is made of half of the normal images. The other half is divided at random into calibration and production images,
several times. A stream draws from the production images with replacement: 20,000 images without a change, alone and with
5 % of defective images among them; and 200 images without a change, then changed images until the monitor detects drift.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from common import heading, nominal_halves
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from patchcore_plugin.bundle import Calibration
from patchcore_plugin.scoring.drift import ALARM_LEVEL, DriftMonitor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from patchcore_plugin import PatchcoreRuntime

STREAM_LENGTH, DETECTION_LIMIT = 20_000, 2000
SHIFTS = {
    "40 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "40 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "20 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "20 % darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "blur, sigma 2 pixels": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "blur, sigma 1 pixel": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "camera turned by 3 degrees": lambda image: image.rotate(3, Image.Resampling.BILINEAR),
    "camera moved by 4 pixels": lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 4, 0, 1, 4)),
}


def scores_and_means(runtime: PatchcoreRuntime, images: Iterable[np.ndarray | Path]) -> np.ndarray:
    """Score and mean distance of images, ``(N, 2)``."""
    return np.array([(answer.score, answer.mean_distance) for answer in runtime.stream(images)])


def monitor_of(calibration: np.ndarray) -> DriftMonitor:
    scores, means = np.sort(calibration, axis=0).T.tolist()
    return DriftMonitor(Calibration(false_positive_rate=0.05, scores=scores, peaks=scores, means=means))


def feed(monitor: DriftMonitor, stream: np.ndarray) -> tuple[int, float]:
    """Give a stream to the monitor; returns the number of alarms and the largest evidence."""
    alarms, most = 0, 0.0
    for score, distance in stream:
        alarms += monitor.update(score, distance)
        most = max(most, monitor.evidence)
    return alarms, most


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="[default: ELPV]")
@click.option("--divisions", default=20, show_default=True)
@click.option("--calibration", default=[100, 177], multiple=True, show_default=True, help="Images; may be repeated.")
def main(data: Path | None, divisions: int, calibration: list[int]) -> None:
    """Print false alarms, and the number of images until drift is detected."""
    click.echo(heading("openvino", "faiss-cpu"))
    with tempfile.TemporaryDirectory() as folder:
        runtime, normal, defective = nominal_halves(data, Path(folder))
        still, bad = scores_and_means(runtime, normal), scores_and_means(runtime, defective)
        moved = {}
        for name, shift in track(SHIFTS.items(), description="Shift"):
            moved[name] = scores_and_means(runtime, (np.asarray(shift(Image.open(path).convert("RGB"))) for path in normal))
    for count in calibration:
        results = {name: [] for name in ("none", "none, 5 % defective", *SHIFTS)}
        for seed in track(range(divisions), description=f"{count} images"):
            rng = np.random.default_rng(seed)
            order = rng.permutation(len(still))
            known, rest = still[order[:count]], order[count:]
            pure = still[rng.choice(rest, STREAM_LENGTH)]
            results["none"].append(feed(monitor_of(known), pure))
            mixed = np.where(rng.random((STREAM_LENGTH, 1)) < 0.05, bad[rng.integers(len(bad), size=STREAM_LENGTH)], pure)
            results["none, 5 % defective"].append(feed(monitor_of(known), mixed))
            for name, values in moved.items():
                monitor = monitor_of(known)
                feed(monitor, pure[:200])
                stream = enumerate(values[rng.choice(rest, DETECTION_LIMIT)], start=1)
                results[name].append(next((number for number, image in stream if monitor.update(*image)), None))
        click.echo(f"{count} calibration images of {len(still)}, threshold {ALARM_LEVEL:g}, {divisions} divisions")
        table = Table("shift", "images", "alarms", "largest evidence")
        for name in ("none", "none, 5 % defective"):
            alarms, most = zip(*results.pop(name), strict=True)
            table.add_row(name, f"{divisions} x {STREAM_LENGTH:,}", str(sum(alarms)), f"{max(most):.3g}")
        Console(width=125).print(table)
        table = Table("shift", "detected", "after images, median", "at most")
        for name, delays in results.items():
            detected = sorted(delay for delay in delays if delay is not None)
            median, most = (f"{detected[len(detected) // 2]}", f"{detected[-1]}") if detected else ("", "")
            table.add_row(name, f"{len(detected)} of {divisions}", median, most)
        Console(width=125).print(table)


if __name__ == "__main__":
    main()
