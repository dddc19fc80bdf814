"""Where a bundle's time goes on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov

from patchcore_plugin.bundle import FEATURES
from patchcore_plugin.cpu import compile_options
from patchcore_plugin.images import read_image
from patchcore_plugin.runtime import PatchcoreRuntime
from patchcore_plugin.runtime.network import read_preprocessing
from patchcore_plugin.scoring import anomaly_map

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

STAGES = ("decode", "preprocess", "backbone", "search", "map")


def stages(runtime: PatchcoreRuntime, images: Iterable[Path]) -> dict[str, list[float]]:
    """Milliseconds of each stage for each image, one image at a time.

    Args:
        runtime: A bundle, loaded in mode ``"latency"``.
        images: Image files.

    Returns:
        For each of :data:`STAGES` one time per image. The backbone's is that of the whole network less that of its
        pre-processing, which is measured by itself.
    """
    core = ov.Core()
    options = {**compile_options("latency", runtime.threads), "INFERENCE_PRECISION_HINT": "f32"}
    steps = core.compile_model(read_preprocessing(core, runtime.path / FEATURES), "CPU", options)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number, image in enumerate(images):
        marks = [time.perf_counter()]

        def mark(marks: list[float] = marks) -> None:
            marks.append(time.perf_counter())

        pixels = read_image(image)
        mark()
        steps([pixels[None]], share_inputs=True, share_outputs=True)
        mark()
        embedding = runtime.embed([pixels])
        mark()
        scores = runtime.bank.score(embedding, runtime.rule)
        mark()
        anomaly_map(scores.patch, runtime.manifest.preprocessing.size)
        mark()
        decode, preprocess, embed, search, smooth = 1000 * np.diff(marks)
        if number:  # the first image of a size takes longer
            for stage, spent in zip(STAGES, (decode, preprocess, embed - preprocess, search, smooth), strict=True):
                times[stage].append(float(spent))
    return times


def images_per_second(runtime: PatchcoreRuntime, images: Iterable[Path]) -> float:
    """Images that the runtime scores in a second, from file to score, maps included."""
    images = list(images)
    runtime.predict(images[:2])
    started = time.perf_counter()
    for answer in runtime.stream(images):
        _ = answer.anomaly_map  # drawn when asked for
    return len(images) / (time.perf_counter() - started)
